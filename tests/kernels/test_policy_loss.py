"""Policy loss against the published formulas, one token at a time in float64."""

import math
from dataclasses import replace

import pytest
import torch

from losscases import COLUMNS, clipped_loss, draw, formula, gradients
from speciarl.kernels.loss import KINDS, STATS, LossSpec, policy_gradients, policy_loss

SPECS = [
    LossSpec(),
    LossSpec(clip_low=0.2, clip_high=0.28, dual_clip=None, kl_coef=0.0),
    LossSpec(kl="k1", kl_coef=0.3, importance_cap=1.5),
    LossSpec(kl="k2", kl_coef=0.7, entropy_coef=0.05, dual_clip=1.5),
    LossSpec(kl="k3", kl_coef=-0.4, importance_cap=0.5, entropy_coef=-0.03),
    LossSpec(clip_low=0.0, clip_high=0.0, dual_clip=2.0),
    LossSpec(kind="cispo", clip_low=1.0, clip_high=0.5, kl_coef=0.0),
    LossSpec(kind="cispo", clip_low=0.3, kl="k1", importance_cap=1.5, entropy_coef=0.1),
    LossSpec(kind="gspo", clip_low=0.1, clip_high=0.1, dual_clip=1.2),
    LossSpec(kind="gspo", kl="k2", importance_cap=1.5, entropy_coef=0.1, dual_clip=None),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", SPECS)
def test_every_token_against_the_formula(spec: LossSpec, seed: int) -> None:
    data = draw(seed, in_order=bool(seed))
    loss, stats = policy_loss(**data, spec=spec)
    expected, expected_stats = formula(data, spec)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(loss, data), gradients(expected, data), rtol=1e-11, atol=1e-13
    )
    assert not stats.requires_grad
    torch.testing.assert_close(stats, expected_stats, rtol=1e-11, atol=1e-12)


def test_the_draws_reach_every_branch() -> None:
    _, stats = policy_loss(**draw(2), spec=LossSpec())
    assert (stats[1:4] > 0).all(), STATS[1:4]  # clipped low, high and dual


def test_fp32_and_two_runs_are_bit_equal() -> None:
    data = {k: v if k == "sequence_ids" else v.detach().float() for k, v in draw().items()}
    data["new"].requires_grad_()
    spec = LossSpec(importance_cap=2.0, entropy_coef=0.01)
    loss, stats = policy_loss(**data, spec=spec)
    assert loss.dtype == stats.dtype == torch.float32
    double = {k: v if k == "sequence_ids" else v.double() for k, v in data.items()}
    expected, _ = formula(double, spec)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    again, stats_again = policy_loss(**data, spec=spec)
    assert torch.equal(loss, again) and torch.equal(stats, stats_again)


@pytest.mark.parametrize("cuts", [[30], [1, 2, 59], [0, 20, 20, 40, 60]])
def test_micro_batches_add_up_to_the_whole(cuts: list[int]) -> None:
    data, spec = draw(), LossSpec(importance_cap=1.5, entropy_coef=0.1)
    loss, stats = policy_loss(**data, spec=spec)
    whole = gradients(loss, data)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 60], strict=True):
        cut = data | {name: data[name][start:stop] for name in COLUMNS}
        parts.append(policy_loss(**cut, spec=spec))
    summed = sum((part for part, _ in parts), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(summed, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(summed, data), whole, rtol=1e-12, atol=1e-14)
    table = torch.stack([s for _, s in parts])
    torch.testing.assert_close(table[:, :-1].sum(0), stats[:-1], rtol=1e-12, atol=1e-12)
    assert table[:, -1].max() == stats[-1]


def test_zero_weight_sequences_contribute_nothing() -> None:
    data, spec = draw(), LossSpec(importance_cap=1.5, entropy_coef=0.1)
    filler = data["weights"][data["sequence_ids"].long()] == 0
    assert filler.any()
    loss, stats = policy_loss(**data, spec=spec)
    grads = gradients(loss, data)
    assert all((grad[filler] == 0).all() for grad in grads)
    kept = {k: v if k in ("advantages", "weights") else v[~filler] for k, v in data.items()}
    alone, alone_stats = policy_loss(**kept, spec=spec)
    torch.testing.assert_close(alone, loss)
    torch.testing.assert_close(alone_stats, stats)


def test_what_weighs_nothing_may_hold_anything() -> None:
    for kind in KINDS:
        spec = LossSpec(kind=kind, importance_cap=1.5, entropy_coef=0.1)
        data = {k: v.detach() for k, v in draw().items()}
        clean = policy_gradients(**data, spec=spec, ref_gradient=True)
        filler = data["weights"][data["sequence_ids"].long()] == 0
        for name in ("new", "old", "ref", "engine", "entropy"):
            data[name] = data[name].masked_fill(filler, -math.inf)
        data["advantages"] = data["advantages"].masked_fill(data["weights"] == 0, math.nan)
        for one, other in zip(
            clean, policy_gradients(**data, spec=spec, ref_gradient=True), strict=True
        ):
            assert one is not None and other is not None and torch.equal(one, other)


def test_gspo_is_the_gradient_of_the_sequence_objective() -> None:
    """Sum over sequences of weight x length x clipped loss of exp(mean log-ratio), eq. 5."""
    data, spec = draw(), LossSpec(kind="gspo", clip_low=0.2, clip_high=0.2, kl_coef=0.0)
    loss, _ = policy_loss(**data, spec=spec)
    log_ratio, ids = data["new"] - data["old"], data["sequence_ids"]
    direct = torch.zeros((), dtype=torch.float64)
    for sequence, (weight, adv) in enumerate(zip(data["weights"], data["advantages"], strict=True)):
        own = log_ratio[ids == sequence]
        if len(own):
            direct = direct + weight * len(own) * clipped_loss(own.mean().exp(), adv.item(), spec)
    torch.testing.assert_close(loss, direct, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(loss, data)[0], gradients(direct, data)[0])


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    data = draw()
    spec = LossSpec(kind="cispo", clip_low=1.0, clip_high=0.5, kl_coef=0.0)
    _, stats, slope, _, _ = policy_gradients(**data, spec=spec)
    index = data["sequence_ids"].long()
    per_token = data["weights"][index] * data["advantages"][index]
    assert torch.equal(slope != 0, per_token != 0)
    held = (data["new"] - data["old"]).exp().clamp(max=1.5)
    torch.testing.assert_close(slope, -per_token * held)
    assert stats[STATS.index("clipped_low")] == 0 < stats[STATS.index("clipped_high")]


def test_gradients_without_autograd_are_those_of_the_loss() -> None:
    data, spec = draw(), LossSpec(importance_cap=1.5, entropy_coef=0.1)
    loss, stats = policy_loss(**data, spec=spec)
    found = policy_gradients(**data, spec=spec, ref_gradient=True)
    assert torch.equal(found.loss, loss) and torch.equal(found.stats, stats)
    wanted = gradients(3.0 * loss, data)
    for grad, expected in zip(found[2:], wanted, strict=True):
        assert grad is not None and not grad.requires_grad
        torch.testing.assert_close(3.0 * grad, expected)
    assert (
        policy_gradients(**data, spec=LossSpec(kl_coef=0.0), ref_gradient=True)[3:] == (None,) * 2
    )
    assert policy_gradients(**data, spec=LossSpec())[3:] == (None, None)


def one_token(ratio: float, advantage: float, spec: LossSpec) -> tuple[float, float, dict]:
    """Loss, d loss / d new and statistics of a single token of weight 1."""
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(
        new,
        torch.zeros(1, dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        weights=torch.ones(1, dtype=torch.float64),
        sequence_ids=torch.zeros(1, dtype=torch.int64),
        spec=replace(spec, kl_coef=0.0),
    )
    (grad,) = torch.autograd.grad(loss, new)
    return loss.item(), grad.item(), dict(zip(STATS, stats.tolist(), strict=True))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope", "counted"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.0, -2.0, 2.0, 2.0, None),
        (1.27, 1.0, -1.27, -1.27, None),
        (1.29, 1.0, -1.28, 0.0, "clipped_high"),
        (0.1, 1.0, -0.1, -0.1, None),  # a good token that became rare is still pulled up
        (0.81, -1.0, 0.81, 0.81, None),
        (0.79, -1.0, 0.8, 0.0, "clipped_low"),
        (2.99, -1.0, 2.99, 2.99, None),  # a bad token that became common is still pushed down
        (3.01, -1.0, 3.0, 0.0, "dual_clipped"),
        (5.0, 0.0, 0.0, 0.0, None),
    ],
)
def test_clip_boundaries(
    ratio: float, advantage: float, expected: float, slope: float, counted: str | None
) -> None:
    loss, grad, stats = one_token(ratio, advantage, LossSpec(clip_high=0.28))
    assert loss == pytest.approx(expected, abs=1e-12)
    assert grad == pytest.approx(slope, abs=1e-12)
    for name in ("clipped_low", "clipped_high", "dual_clipped"):
        assert stats[name] == (name == counted)


def test_without_dual_clip_the_loss_is_unbounded() -> None:
    loss, grad, stats = one_token(9.0, -1.0, LossSpec(dual_clip=None))
    assert loss == pytest.approx(9.0) and grad == pytest.approx(9.0)
    assert stats["dual_clipped"] == 0


def test_first_update_has_ratio_one_and_the_policy_gradient() -> None:
    data = draw()
    data["old"] = data["new"].detach()
    loss, stats = policy_loss(**data, spec=LossSpec(kl_coef=0.0))
    (grad,) = torch.autograd.grad(loss, data["new"])
    index = data["sequence_ids"].long()
    torch.testing.assert_close(grad, -(data["advantages"] * data["weights"])[index])
    assert stats[STATS.index("ratio")] == stats[STATS.index("tokens")]


def test_gradients_reach_only_the_columns_that_learn() -> None:
    data = draw()
    data["old"].requires_grad_()
    data["engine"].requires_grad_()
    loss, _ = policy_loss(**data, spec=LossSpec(importance_cap=2.0, entropy_coef=0.1))
    loss.backward()
    assert all(data[name].grad is not None for name in ("new", "ref", "entropy"))
    assert data["old"].grad is None and data["engine"].grad is None


def test_huge_log_ratios_stay_finite() -> None:
    new = torch.tensor([-0.1, -900.0, -0.1, -900.0], requires_grad=True)
    old = torch.tensor([-900.0, -0.1, -900.0, -0.1])
    loss, stats = policy_loss(
        new,
        old,
        advantages=torch.tensor([1.0, -1.0]),
        weights=torch.ones(2),
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        spec=LossSpec(importance_cap=2.0),
        ref=old,
        engine=new.detach(),
    )
    loss.backward()
    assert loss.isfinite() and stats.isfinite().all()
    assert new.grad is not None and new.grad.isfinite().all()


def test_no_tokens() -> None:
    data = draw()
    empty = data | {name: data[name][:0] for name in COLUMNS}
    loss, stats = policy_loss(**empty, spec=LossSpec())
    loss.backward()
    assert loss == 0 and not stats.any()


def test_no_value_is_read_on_the_host() -> None:
    # A meta tensor has no values: reading one, or a mask of unknown size, raises.
    data = {k: v.detach().to("meta") for k, v in draw().items()}
    data["new"].requires_grad_()
    loss, _ = policy_loss(**data, spec=LossSpec(importance_cap=2.0, entropy_coef=0.1))
    loss.backward()
    assert data["new"].grad.shape == data["new"].shape


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "ppo"}, "grpo, cispo, gspo"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_high": math.inf}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"kl": "k4"}, "k1, k2, k3"),
        ({"kl_coef": math.nan}, "kl_coef"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"entropy_coef": math.inf}, "entropy_coef"),
    ],
)
def test_bad_coefficients_are_named(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LossSpec(**changes)


@pytest.mark.parametrize(
    ("spec", "changes", "named"),
    [
        (LossSpec(), {"ref": None}, "'ref'"),
        (LossSpec(importance_cap=1.0), {"engine": None}, "'engine'"),
        (LossSpec(entropy_coef=0.1), {"entropy": None}, "'entropy'"),
        (LossSpec(), {"old": torch.zeros(3)}, "old"),
        (LossSpec(), {"ref": torch.zeros(60)}, "ref"),
        (LossSpec(), {"new": torch.zeros(60, dtype=torch.bfloat16)}, "new"),
        (LossSpec(), {"weights": torch.zeros(3)}, "weights"),
        (LossSpec(), {"sequence_ids": torch.zeros(60)}, "sequence_ids"),
        (LossSpec(), {"sequence_ids": torch.full((60,), 7)}, "sequence_ids holds 7"),
        (LossSpec(), {"sequence_ids": torch.full((60,), -1)}, "sequence_ids holds -1"),
        (LossSpec(), {"weights": torch.ones(0), "advantages": torch.ones(0)}, "weights is empty"),
        (LossSpec(), {"old": torch.zeros(60, dtype=torch.float64, device="meta")}, "old lies on"),
        (LossSpec(), {"route": "fused"}, "auto, reference, triton"),
        (LossSpec(), {"route": "triton"}, "fp32"),
    ],
)
def test_bad_columns_are_named(spec: LossSpec, changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        policy_loss(**(draw() | changes), spec=spec)
