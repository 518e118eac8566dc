"""What the loss reports of the engine's log-probs, on every route, against Python's own floats."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from speciarl.kernels.fused import linear_policy_loss
from speciarl.kernels.loss import STATS, LossSpec, policy_loss

pytest.importorskip("triton")

OWN = ("engine_mismatch", "engine_k1", "engine_k3", "engine_weight_squared")
WEIGHTS = torch.tensor([0.3, 0.0, 0.2, 0.5])  # sequence 1 counts nowhere
SPEC = LossSpec(kl_coef=0.0)
Stats = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def from_columns(route: str) -> Stats:
    """Statistics of `policy_loss` [len(STATS)] of old, engine and sequence ids [T]."""

    def run(old: Tensor, engine: Tensor | None, ids: Tensor) -> Tensor:
        given: dict[str, Any] = {
            "weights": WEIGHTS,
            "advantages": torch.ones(4),
            "sequence_ids": ids,
        }
        new = old - 0.1
        return policy_loss(new, old, engine=engine, **given, spec=SPEC, route=route)[1]

    return run


def from_states(route: str) -> Stats:
    """The same of `linear_policy_loss`, in chunks of 7 tokens."""

    def run(old: Tensor, engine: Tensor | None, ids: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        hidden, matrix = torch.randn(len(old), 8, generator=rng), torch.randn(12, 8, generator=rng)
        return linear_policy_loss(
            hidden,
            matrix,
            torch.zeros(len(old), dtype=torch.int64),
            old=old,
            engine=engine,
            advantages=torch.ones(4),
            weights=WEIGHTS,
            sequence_ids=ids,
            spec=SPEC,
            chunk=7,
            route=route,
        )[1]

    return run


ROUTES = {
    "reference": from_columns("reference"),
    "triton": from_columns("triton"),
    "chunks": from_states("auto"),
    "chunks of rows": from_states("rows"),
}
every_route = pytest.mark.parametrize("run", ROUTES.values(), ids=ROUTES)


def draw(size: float, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """old, engine (about `size` nats apart) and sequence ids [tokens], fp32."""
    rng = torch.Generator().manual_seed(1)
    old = -torch.rand(tokens, generator=rng) - 0.1
    engine = old + size * torch.randn(tokens, generator=rng)
    return old, engine, torch.randint(4, (tokens,), generator=rng)


def own(stats: Tensor) -> list[float]:
    """The statistics in the order of OWN."""
    return [stats[STATS.index(name)].item() for name in OWN]


def direct(old: Tensor, engine: Tensor, ids: Tensor) -> list[float]:
    """The same by their definitions, one token at a time."""
    apart = [
        o - e
        for o, e, sequence in zip(old.tolist(), engine.tolist(), ids.tolist(), strict=True)
        if WEIGHTS[sequence] != 0
    ]
    held = [min(max(a, -30.0), 30.0) for a in apart]
    return [
        math.fsum(map(abs, apart)),
        math.fsum(-h for h in held),
        math.fsum(math.expm1(h) - h for h in held),
        math.fsum(math.exp(2 * h) for h in held),
    ]


@every_route
@pytest.mark.parametrize("size", [1e-6, 1e-4, 0.02, 0.49, 3.0])
def test_every_token_by_the_definitions(run: Stats, size: float) -> None:
    """From fp32 rounding to engines that have lost the policy; k3 keeps its digits throughout."""
    old, engine, ids = draw(size)
    found, wanted = own(run(old, engine, ids)), direct(old, engine, ids)
    for name, value, right in zip(OWN, found, wanted, strict=True):
        # Terms of k1 have both signs: its error is measured by their sum without signs.
        within = 1e-6 * wanted[0] if name == "engine_k1" else 5e-6 * right
        assert value == pytest.approx(right, abs=within, rel=0), name


@every_route
def test_the_sum_of_the_weights_follows(run: Stats) -> None:
    old, engine, ids = draw(0.4)
    stats = dict(zip(STATS, run(old, engine, ids).tolist(), strict=True))
    weights = (old - engine).double().exp()[WEIGHTS[ids] != 0]
    assert stats["tokens"] == len(weights) < len(old)
    found = stats["tokens"] + stats["engine_k3"] - stats["engine_k1"]
    assert found == pytest.approx(weights.sum().item(), rel=1e-6)


@every_route
def test_differences_beyond_the_limit_stay_finite(run: Stats) -> None:
    old = torch.tensor([-0.1, -900.0, -0.1, -50.0])
    engine = torch.tensor([-900.0, -0.1, -50.0, -0.1])
    ids = torch.tensor([0, 0, 2, 3])
    stats = run(old, engine, ids)
    assert stats.isfinite().all()
    assert own(stats) == pytest.approx(direct(old, engine, ids), rel=1e-5)
    assert stats[-1] == pytest.approx(899.9)


@every_route
def test_without_an_engine_they_are_zero(run: Stats) -> None:
    old, _, ids = draw(1.0)
    assert own(run(old, None, ids)) == [0.0] * 4
    assert own(run(old, old, ids))[:3] == [0.0] * 3


@every_route
def test_parts_add_up_to_the_whole(run: Stats) -> None:
    old, engine, ids = draw(0.3)
    whole = run(old, engine, ids)
    parts = [
        run(old[part], engine[part], ids[part])
        for part in (slice(0, 1), slice(1, 13), slice(13, 13), slice(13, 40))
    ]
    summed = own(torch.stack(parts).sum(0))
    assert summed == pytest.approx(own(whole), rel=1e-5, abs=1e-5)
    assert torch.stack(parts)[:, -1].max() == whole[-1]


@pytest.mark.parametrize("route", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["grpo", "cispo", "gspo"])
def test_the_importance_weight_is_of_old_over_engine(kind: str, route: str) -> None:
    """Not of new over engine: that quotient is the ratio's part."""
    old, engine, ids = draw(0.6)
    spec = LossSpec(kind=kind, kl_coef=0.0, importance_cap=1.3, dual_clip=None)
    given: dict[str, Any] = {
        "advantages": torch.ones(4),
        "weights": WEIGHTS,
        "sequence_ids": ids,
        "route": route,
    }
    found = {}
    for moved in (0.0, 0.5):
        new = (old - moved).requires_grad_()
        loss, stats = policy_loss(new, old, engine=engine, spec=spec, **given)
        found[moved] = stats[STATS.index("importance_weight")]
        plain, _ = policy_loss(new, old, spec=LossSpec(kind=kind, kl_coef=0.0), **given)
        slope, bare = (torch.autograd.grad(value, new)[0] for value in (loss, plain))
        torch.testing.assert_close(slope, bare * (old - engine).exp().clamp(max=1.3))
    wanted = (old - engine).exp().clamp(max=1.3)[WEIGHTS[ids] != 0].sum()
    torch.testing.assert_close(found[0.0], wanted)
    assert found[0.5] == found[0.0]
