"""Policy loss against the published formulas, one token at a time in float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speciarl.kernels.loss import STATS, LossSpec, policy_loss

SPECS = [
    LossSpec(),
    LossSpec(clip_low=0.2, clip_high=0.28, dual_clip=None, kl_coef=0.0),
    LossSpec(kl="k1", kl_coef=0.3, importance_cap=1.5),
    LossSpec(kl="k2", kl_coef=0.7, entropy_coef=0.05, dual_clip=1.5),
    LossSpec(kl="k3", kl_coef=-0.4, importance_cap=0.5, entropy_coef=-0.03),
    LossSpec(clip_low=0.0, clip_high=0.0, dual_clip=2.0),
]


def draw(seed: int = 0, tokens: int = 60, sequences: int = 7) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)

    def normal(size: int, scale: float) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64) * scale

    new = -normal(tokens, 1.0).abs()
    weights = torch.rand(sequences, generator=rng, dtype=torch.float64)
    weights[2] = 0.0
    advantages = normal(sequences, 1.0)
    advantages[0] = 0.0
    return {
        "new": new.requires_grad_(),
        "old": new.detach() + normal(tokens, 0.8),
        "advantages": advantages,
        "weights": weights,
        "sequence_ids": torch.randint(sequences, (tokens,), generator=rng).sort().values.int(),
        "ref": (new.detach() + normal(tokens, 0.5)).requires_grad_(),
        "engine": new.detach() + normal(tokens, 0.5),
        "entropy": normal(tokens, 1.0).abs().requires_grad_(),
    }


def token_oracle(
    new: Tensor, old: float, ref: Tensor, engine: float, entropy: Tensor, adv: float, spec: LossSpec
) -> Tensor:
    """The loss of one token as the papers write it; scalars."""
    ratio = torch.exp(new - old)
    unclipped = -adv * ratio
    clipped = -adv * torch.clamp(ratio, 1 - spec.clip_low, 1 + spec.clip_high)
    loss = unclipped if unclipped >= clipped else clipped
    if adv < 0 and spec.dual_clip is not None:
        cap = torch.tensor(-adv * spec.dual_clip, dtype=torch.float64)
        loss = loss if loss <= cap else cap
    if spec.importance_cap is not None:
        loss = loss * min(math.exp(old - engine), spec.importance_cap)
    gap = ref - new
    kl = {"k1": -gap, "k2": gap**2 / 2, "k3": torch.exp(gap) - gap - 1}[spec.kl]
    return loss + spec.kl_coef * kl - spec.entropy_coef * entropy


def oracle(data: dict[str, Any], spec: LossSpec) -> tuple[Tensor, dict[str, float]]:
    total = torch.zeros((), dtype=torch.float64)
    stats = dict.fromkeys(STATS, 0.0)
    for t, s in enumerate(data["sequence_ids"].tolist()):
        adv, weight = data["advantages"][s].item(), data["weights"][s].item()
        new, old = data["new"][t], data["old"][t].item()
        ref, engine, entropy = data["ref"][t], data["engine"][t].item(), data["entropy"][t]
        loss = weight * token_oracle(new, old, ref, engine, entropy, adv, spec)
        total = total + loss
        if weight == 0:
            continue
        ratio, gap = math.exp(new.item() - old), ref.item() - new.item()
        cap = spec.importance_cap
        stats["tokens"] += 1
        stats["clipped_low"] += adv < 0 and ratio < 1 - spec.clip_low
        stats["clipped_high"] += adv > 0 and ratio > 1 + spec.clip_high
        stats["dual_clipped"] += adv < 0 and ratio > (spec.dual_clip or math.inf)
        stats["ratio"] += ratio
        stats["kl_k1"] += -gap
        stats["kl_k3"] += math.exp(gap) - gap - 1
        stats["engine_mismatch"] += abs(old - engine)
        stats["importance_weight"] += 1.0 if cap is None else min(math.exp(old - engine), cap)
        stats["entropy"] += entropy.item()
        stats["loss"] += loss.item()
        stats["engine_mismatch_max"] = max(stats["engine_mismatch_max"], abs(old - engine))
    return total, stats


def gradients(loss: Tensor, data: dict[str, Any]) -> tuple[Tensor, ...]:
    carriers = [data[name] for name in ("new", "ref", "entropy")]
    return torch.autograd.grad(loss, carriers, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spec", SPECS)
def test_every_token_against_the_formula(spec: LossSpec, seed: int) -> None:
    data = draw(seed)
    loss, stats = policy_loss(**data, spec=spec)
    expected, expected_stats = oracle(data, spec)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(loss, data), gradients(expected, data), rtol=1e-11, atol=1e-13
    )
    assert not stats.requires_grad
    torch.testing.assert_close(
        stats,
        torch.tensor(list(expected_stats.values()), dtype=torch.float64),
        rtol=1e-11,
        atol=1e-12,
    )


def test_the_draws_reach_every_branch() -> None:
    _, stats = policy_loss(**draw(), spec=LossSpec())
    assert (stats[1:4] > 0).all(), STATS[1:4]  # clipped low, high and dual


def test_fp32_and_two_runs_are_bit_equal() -> None:
    data = {k: v if k == "sequence_ids" else v.detach().float() for k, v in draw().items()}
    data["new"].requires_grad_()
    spec = LossSpec(importance_cap=2.0, entropy_coef=0.01)
    loss, stats = policy_loss(**data, spec=spec)
    assert loss.dtype == stats.dtype == torch.float32
    double = {k: v if k == "sequence_ids" else v.double() for k, v in data.items()}
    expected, _ = oracle(double, spec)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    again, stats_again = policy_loss(**data, spec=spec)
    assert torch.equal(loss, again) and torch.equal(stats, stats_again)


@pytest.mark.parametrize("cuts", [[30], [1, 2, 59], [0, 20, 20, 40, 60]])
def test_micro_batches_add_up_to_the_whole(cuts: list[int]) -> None:
    data, spec = draw(), LossSpec(importance_cap=1.5, entropy_coef=0.1)
    loss, stats = policy_loss(**data, spec=spec)
    whole = gradients(loss, data)
    columns = ("new", "old", "ref", "engine", "entropy", "sequence_ids")
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 60], strict=True):
        cut = data | {name: data[name][start:stop] for name in columns}
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
    columns = ("new", "old", "ref", "engine", "entropy", "sequence_ids")
    empty = data | {name: data[name][:0] for name in columns}
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
        ({"clip_low": 1.0}, "clip_low"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": 1.5}, "clip_high"),
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
    ],
)
def test_bad_columns_are_named(spec: LossSpec, changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        policy_loss(**(draw() | changes), spec=spec)
