"""The policy loss from hidden states is policy_loss of linear_logprob, in a chunk's memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from headcases import ROUTES, Record, draw, in_double, keep_saved, off
from speciarl.kernels import faults, products
from speciarl.kernels.fused import linear_policy_loss
from speciarl.kernels.head import linear_logprob
from speciarl.kernels.loss import STATS, LossSpec, policy_loss

pytest.importorskip("triton")

every_route = pytest.mark.parametrize(("route", "dtype"), ROUTES)
SPECS = {
    "grpo": LossSpec(),
    "entropy": LossSpec(kl_coef=0.0, entropy_coef=0.02, importance_cap=1.1),
    "cispo": LossSpec(kind="cispo", clip_high=0.3, kl="k2"),
}


def columns(targets: Tensor, dtype: torch.dtype, spec: LossSpec) -> dict[str, Any]:
    """Sequences of different lengths and weights, one of weight 0; log-probs near uniform ones."""
    rows = len(targets)
    rng = torch.Generator().manual_seed(2)

    def noise(mean: float) -> Tensor:
        return (mean + 0.3 * torch.randn(rows, generator=rng)).to(dtype)

    return {
        "old": noise(-4.0),
        "ref": noise(-4.0) if spec.kl_coef else None,
        "engine": noise(-4.0),
        "advantages": torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5]).to(dtype),
        "weights": torch.tensor([0.1, 0.2, 0.05, 0.3, 0.0]).to(dtype),
        "sequence_ids": torch.arange(rows) ** 2 // rows * 5 // rows,
        "spec": spec,
    }


def apart(
    inputs: tuple[Tensor, Tensor, Tensor], given: dict[str, Any], **how: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The two functions one after the other: loss, statistics, gradients."""
    hidden, weight, targets = inputs
    given = dict(given)
    entropy = given["spec"].entropy_coef != 0
    out = linear_logprob(hidden, weight, targets, return_entropy=entropy, **how)
    new, bonus = out if isinstance(out, tuple) else (out, None)
    old = given.pop("old")
    loss, stats = policy_loss(new, new.detach() if old is None else old, entropy=bonus, **given)
    return loss, stats, torch.autograd.grad(loss, (hidden, weight))


@every_route
@pytest.mark.parametrize(
    ("name", "moved"), [("grpo", True), ("grpo", False), ("entropy", True), ("cispo", True)]
)
def test_equals_the_two_functions(route: str, dtype: torch.dtype, name: str, moved: bool) -> None:
    inputs = draw(37, 61, 16, dtype=dtype, spread=0.7)
    given = columns(inputs[2], torch.float32, SPECS[name])
    if not moved:
        given["old"] = None
    how: dict[str, Any] = {"route": route, "temperature": 0.9, "banned": torch.tensor([61 - 1])}
    inputs[2].clamp_(max=59)
    wanted_loss, wanted_stats, wanted_grads = apart(inputs, given, **how)
    loss, stats = linear_policy_loss(*inputs, chunk=16, **given, **how)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats, wanted_stats, rtol=1e-5, atol=1e-5)
    for value, right in zip(torch.autograd.grad(loss, inputs[:2]), wanted_grads, strict=True):
        assert value.dtype == dtype
        assert off(value, right.double()) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_gradient_is_that_of_float64() -> None:
    hidden, weight, targets = draw(23, 31, 8, spread=0.7)
    given = columns(targets, torch.float64, SPECS["entropy"])
    twins = in_double(hidden, weight)
    entries = (twins[0] @ twins[1].T).log_softmax(1)
    new = entries.gather(1, targets[:, None])[:, 0]
    bonus = -(entries.exp() * entries).sum(1)
    wanted, _ = policy_loss(new, entropy=bonus, **given)
    loss, _ = linear_policy_loss(hidden, weight, targets, chunk=5, **given)
    torch.testing.assert_close(loss, wanted)
    found = torch.autograd.grad(3.0 * loss, (hidden, weight))  # the backward pass scales
    torch.testing.assert_close(found, torch.autograd.grad(3.0 * wanted, twins))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs(frozen: str) -> None:
    hidden, weight, targets = draw(23, 31, 8, dtype=torch.float32)
    given = columns(targets, torch.float32, SPECS["grpo"])
    loss, stats = linear_policy_loss(hidden, weight, targets, chunk=8, **given)
    wanted = torch.autograd.grad(loss, (hidden, weight))
    held = [
        x.detach() if frozen in (name, "both") else x
        for name, x in (("hidden", hidden), ("weight", weight))
    ]
    with Record() as record:
        again, same = linear_policy_loss(*held, targets, chunk=8, **given)
    assert record.products == {"both": 3, "hidden": 6, "weight": 6}[frozen]
    assert torch.equal(again, loss) and torch.equal(same, stats)
    assert again.requires_grad == (frozen != "both")
    for tensor, right in zip(held, wanted, strict=True):
        if tensor.requires_grad:
            (found,) = torch.autograd.grad(again, tensor)
            assert torch.equal(found, right)


def test_without_gradients_nothing_is_made_for_them() -> None:
    hidden, weight, targets = draw(24, 40, 8, dtype=torch.float32)
    given = columns(targets, torch.float32, SPECS["grpo"])
    with torch.no_grad(), Record() as record:
        loss, _ = linear_policy_loss(hidden, weight, targets, chunk=8, **given)
    assert record.products == 3 and not loss.requires_grad


@pytest.fixture
def no_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products without the fp32 copies of operands that only a CPU makes."""

    def shaped(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(products, "wide_mm", shaped)
    monkeypatch.setattr(products, "wide_addmm", lambda total, a, b: None)
    yield


@pytest.mark.usefixtures("no_products")
def test_the_workspace_is_one_chunks_table() -> None:
    rows, vocab, width, chunk = 64, 264, 8, 16
    hidden, weight, targets = draw(rows, vocab, width, dtype=torch.bfloat16)
    given = columns(targets, torch.float32, SPECS["grpo"])
    saved: list[Tensor] = []
    with Record(ignored=((vocab, width),)) as record, keep_saved(saved):
        loss, _ = linear_policy_loss(hidden, weight, targets, chunk=chunk, route="expsum", **given)
        loss.backward()
    assert record.bytes <= chunk * vocab * 2
    assert "mm" in record.names  # hidden's gradient needs no copies: it was made
    assert not any(t.numel() >= weight.numel() for t in saved)
    assert weight.grad is not None and weight.grad.shape == weight.shape


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = draw(9, 12, 4, dtype=torch.float32)
    loss, _ = linear_policy_loss(
        hidden, weight, targets, **columns(targets, torch.float32, SPECS["grpo"])
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_no_tokens() -> None:
    hidden, weight, targets = draw(0, 12, 4, dtype=torch.float32)
    given = columns(torch.zeros(4), torch.float32, SPECS["grpo"])
    given |= {name: given[name][:0] for name in ("old", "ref", "engine", "sequence_ids")}
    loss, stats = linear_policy_loss(hidden, weight, targets, **given)
    loss.backward()
    assert float(loss.detach()) == 0.0 and stats.shape == (len(STATS),) and not stats.any()
    assert weight.grad is not None and not weight.grad.any()


@every_route
def test_impossible_targets_on_a_device_have_no_gradient(route: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = draw(8, 20, 8, dtype=dtype)
    targets[2] = 20
    given = columns(targets, torch.float32, SPECS["grpo"])
    faults.take("cpu")
    with faults.deferred():
        loss, _ = linear_policy_loss(hidden, weight, targets, chunk=4, route=route, **given)
        counts = faults.take("cpu")
        grads = torch.autograd.grad(loss, (hidden, weight))
    assert counts[faults.TARGET_RANGE] == 1
    assert not grads[0][2].any() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"spec": LossSpec(kind="gspo")}, "gspo.*no chunked form.*linear_logprob"),
        ({"old": torch.zeros(7)}, r"old \[7\] must be \[9\]"),
        ({"sequence_ids": torch.zeros(10, dtype=torch.int64)}, "sequence_ids"),
        ({"ref": None}, "kl_coef.*ref"),
        ({"targets": torch.zeros(3, 3, dtype=torch.int64)}, r"\[3, 3\] must be \[T\]"),
        ({"targets": torch.full((9,), 12)}, "targets holds 12"),
        ({"temperature": -1.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"route": "fast"}, "route"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], named: str) -> None:
    hidden, weight, targets = draw(9, 12, 4, dtype=torch.float32)
    given = columns(targets, torch.float32, SPECS["grpo"]) | {"targets": targets} | changes
    with pytest.raises(ValueError, match=named):
        linear_policy_loss(hidden, weight, **given)
