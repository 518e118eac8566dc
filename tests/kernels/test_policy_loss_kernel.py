"""The Triton route of the policy loss, under the interpreter, against float64."""

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losscases import COLUMNS, cast, draw, formula, gradients
from speciarl.kernels import faults, launch
from speciarl.kernels.loss import (
    KINDS,
    KL_KINDS,
    STATS,
    Gradients,
    LossSpec,
    policy_gradients,
    policy_loss,
)

tl = pytest.importorskip("triton.language")
from speciarl.kernels import loss_kernel  # noqa: E402

CLIPS = [(0.2, 0.2, 3.0), (0.2, 0.28, None), (0.0, 0.0, 1.5), (1.0, 4.0, None), (0.1, 0.5, 1.2)]
TERMS: dict[str, Any] = {"kl_coef": 0.3, "importance_cap": 1.5, "entropy_coef": 0.1}


def triton(data: dict[str, Any], spec: LossSpec) -> Gradients:
    return policy_gradients(**data, spec=spec, ref_gradient=True, route="triton")


def assert_equal_bits(one: Gradients, other: Gradients) -> None:
    for left, right in zip(one, other, strict=True):
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.equal(left, right)


def assert_matches_formula(data: dict[str, Any], spec: LossSpec) -> None:
    """Loss, statistics and the three gradients, through autograd, against the direct formula."""
    single = cast(data, torch.float32)
    loss, stats = policy_loss(**single, spec=spec, route="triton")
    expected, expected_stats = formula(data, spec)
    assert loss.dtype == stats.dtype == torch.float32 and not stats.requires_grad
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    for found, wanted in zip(gradients(loss, single), gradients(expected, data), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=1e-6)
    counts = slice(0, STATS.index("ratio"))
    assert torch.equal(stats[counts].double(), expected_stats[counts])
    torch.testing.assert_close(stats.double(), expected_stats, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_against_the_formula(
    kind: str, kl: str, clips: tuple[float, float, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_kernel, "BLOCK", 32)
    monkeypatch.setattr(loss_kernel, "MEAN_BLOCK", 32)
    low, high, dual = clips
    spec = LossSpec(kind=kind, kl=kl, clip_low=low, clip_high=high, dual_clip=dual, **TERMS)
    assert_matches_formula(draw(CLIPS.index(clips), in_order=False), spec)


@pytest.mark.parametrize("present", [*itertools.product((False, True), repeat=3)])
@pytest.mark.parametrize("used", [False, True])
def test_columns_that_are_not_given_or_not_used(present: tuple[bool, ...], used: bool) -> None:
    data = cast(draw(1), torch.float32)
    names = (("ref", "kl_coef"), ("engine", "importance_cap"), ("entropy", "entropy_coef"))
    off: dict[str, Any] = {"kl_coef": 0.0, "importance_cap": None, "entropy_coef": 0.0}
    terms = dict(off)
    for (column, coefficient), given_ in zip(names, present, strict=True):
        if not given_:
            data[column] = None
        elif used:
            terms[coefficient] = TERMS[coefficient]
    spec = LossSpec(**terms)
    found = triton(data, spec)
    wanted = policy_gradients(**data, spec=spec, ref_gradient=True, route="reference")
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@settings(max_examples=30)
@given(
    tokens=st.integers(0, 150),
    sequences=st.integers(1, 40),
    block=st.sampled_from((16, 64, 256)),
    kind=st.sampled_from(KINDS),
    in_order=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape_and_grouping(
    tokens: int, sequences: int, block: int, kind: str, in_order: bool, seed: int
) -> None:
    data = draw(seed, tokens, sequences, in_order=in_order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_kernel, "BLOCK", block)
        patch.setattr(loss_kernel, "MEAN_BLOCK", block)
        assert_matches_formula(data, LossSpec(kind=kind, clip_low=0.1, clip_high=0.1, **TERMS))


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_more_programs_than_are_added_up_at_once_and_equal_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_kernel, "_ROWS", tl.constexpr(4))
    monkeypatch.setattr(loss_kernel, "BLOCK", 16)
    monkeypatch.setattr(loss_kernel, "MEAN_BLOCK", 16)
    data = cast(draw(3, 16 * 10, 20, in_order=False), torch.float32)
    spec = LossSpec(kind=kind, **TERMS)
    found = triton(data, spec)
    wanted = policy_gradients(**cast(data, torch.float64), spec=spec, ref_gradient=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert_equal_bits(found, triton(data, spec))


def test_the_ticket_is_back_at_zero() -> None:
    data = cast(draw(), torch.float32)
    for kind in KINDS:
        triton(data, LossSpec(kind=kind))
    ticket = launch.ticket(torch.device("cpu"))
    assert ticket is launch.ticket(torch.device("cpu")) and not ticket.any()


def test_k3_keeps_its_digits_where_new_and_ref_hardly_differ() -> None:
    data = draw(0, 200)
    data["ref"] = (data["new"].detach() * (1 + 1e-4)).float().double().requires_grad_()
    spec = LossSpec(kl="k3", kl_coef=1.0)
    stats = triton(cast(data, torch.float32), spec).stats.double()
    _, exact = formula(data, spec)
    place = STATS.index("kl_k3")
    assert 0 < exact[place] < 1e-4
    torch.testing.assert_close(stats[place], exact[place], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_weight_zero_may_hold_anything(kind: str) -> None:
    spec = LossSpec(kind=kind, **TERMS)
    data = {k: v.detach() for k, v in cast(draw(), torch.float32).items()}
    clean = triton(data, spec)
    filler = data["weights"][data["sequence_ids"].long()] == 0
    for name in set(COLUMNS) - {"sequence_ids"}:
        data[name] = data[name].masked_fill(filler, float("-inf"))
    data["advantages"] = data["advantages"].masked_fill(data["weights"] == 0, float("nan"))
    assert filler.any()
    assert_equal_bits(clean, triton(data, spec))


@pytest.mark.parametrize("kind", KINDS)
def test_log_ratios_beyond_the_limit(kind: str) -> None:
    far = torch.tensor([-0.1, -900.0, -0.1, -900.0])
    near = torch.tensor([-900.0, -0.1, -900.0, -0.1])
    columns = {"new": far, "old": near, "ref": near, "engine": far, "entropy": far.abs()}
    data = columns | {
        "advantages": torch.tensor([1.0, -1.0]),
        "weights": torch.ones(2),
        "sequence_ids": torch.tensor([0, 0, 1, 1]),
    }
    spec = LossSpec(kind=kind, **(TERMS | {"importance_cap": 2.0}))
    found = triton(data, spec)
    wanted = policy_gradients(**data, spec=spec, ref_gradient=True, route="reference")
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nan_is_not_hidden() -> None:
    data = {k: v.detach() for k, v in cast(draw(), torch.float32).items()}
    live = data["weights"][data["sequence_ids"].long()] != 0
    token = int(live.int().argmax())
    data["new"][token] = float("nan")
    for kind in KINDS:
        found = triton(data, LossSpec(kind=kind))
        assert found.loss.isnan() and found.new[token].isnan()


@pytest.mark.parametrize("route", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_are_counted_and_left_out(kind: str, route: str) -> None:
    spec = LossSpec(kind=kind, **TERMS)
    data = {k: v.detach() for k, v in cast(draw(), torch.float32).items()}
    bad = torch.zeros(60, dtype=torch.bool)
    bad[[0, 30, 59]] = True
    kept = {k: v[~bad] if k in COLUMNS else v for k, v in data.items()}
    data["sequence_ids"] = data["sequence_ids"].masked_fill(bad, -1)
    data["sequence_ids"][30] = 7
    data["new"] = data["new"].masked_fill(bad, float("nan"))
    with pytest.raises(ValueError, match=r"sequence_ids holds -1; it must be in \[0, 7\)"):
        policy_gradients(**data, spec=spec, route=route)
    with faults.deferred():
        found = policy_gradients(**data, spec=spec, ref_gradient=True, route=route)
    assert faults.take("cpu").tolist() == [0, 0, 0, 3, 0]
    wanted = policy_gradients(**kept, spec=spec, ref_gradient=True, route=route)
    for one, other in zip(found, wanted, strict=True):
        if one.dim() and len(one) == 60:
            assert not one[bad].any()
            one = one[~bad]
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_strided_and_misaligned_columns_and_any_integer_ids() -> None:
    spec = LossSpec(**TERMS)
    data = {k: v.detach() for k, v in cast(draw(), torch.float32).items()}
    wanted = triton(data, spec)
    strided = {k: v.repeat_interleave(2)[::2] if k in COLUMNS else v for k, v in data.items()}
    shifted = {k: torch.cat([v[:1], v])[1:] for k, v in data.items()}
    assert not strided["new"].is_contiguous() and shifted["new"].data_ptr() % 16
    for dtype in (torch.int64, torch.int16, torch.uint8):
        for case in (strided, shifted):
            ids = {"sequence_ids": case["sequence_ids"].to(dtype)}
            assert_equal_bits(wanted, triton(case | ids, spec))


def test_lengths_and_coefficients_are_run_time_arguments() -> None:
    arguments = inspect.signature(loss_kernel.policy_loss_kernel.fn).parameters
    fixed = {name for name, a in arguments.items() if "constexpr" in str(a.annotation)}
    assert fixed == {"KIND", "KL", "USE_DUAL", "USE_CAP", "BLOCK"}


def test_a_route_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    data, spec = cast(draw(), torch.float32), LossSpec()
    with pytest.raises(ValueError, match="fp32 columns, not torch.float64"):
        policy_gradients(**draw(), spec=spec, route="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="these lie on cpu; with TRITON_INTERPRET=1"):
        triton(data, spec)
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"speciarl\[triton\]"):
        triton(data, spec)
    auto = policy_gradients(**data, spec=replace(spec), ref_gradient=True)
    assert_equal_bits(
        auto, policy_gradients(**data, spec=spec, ref_gradient=True, route="reference")
    )
