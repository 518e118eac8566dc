"""Weight pushes, sleep, and what the engine refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speciarl.rollout.engine import (
    EngineDead,
    Request,
    Rollout,
    RolloutEngine,
    Sampling,
    WeightsRefused,
)
from speciarl.rollout.native import NativeEngine
from tiny import Tiny, perturb

ROUTES = ("fused", "generic")


@pytest.fixture(scope="module")
def tinies(model_dirs: dict[str, Path], pictures: Path) -> dict[str, Tiny]:
    return {kind: Tiny(folder, pictures) for kind, folder in model_dirs.items()}


@pytest.fixture
def toy(tinies: dict[str, Tiny]) -> Tiny:
    return tinies["toy"]


def engine_of(tiny: Tiny, model: Any = None, **options: Any) -> NativeEngine:
    model = tiny.model() if model is None else model
    return NativeEngine(model, stop_ids=[], banned_ids=tiny.banned, **options)


def requests(tiny: Tiny, count: int = 2) -> list[Request]:
    return [Request(p, p.key, (0, 1)) for p in list(tiny.prompts.values())[:count]]


def sample(engine: RolloutEngine, tiny: Tiny) -> list[Rollout]:
    groups = engine.generate(requests(tiny), Sampling(max_new_tokens=6))
    return [rollout for group in groups for rollout in group.rollouts]


def outcome(found: list[Rollout]) -> list[tuple[list[int], list[float]]]:
    return [(rollout.ids, rollout.logprobs) for rollout in found]


def learned(tiny: Tiny) -> Any:
    """The model after an update."""
    model = tiny.model()
    perturb(dict(model.named_parameters()), 0.1)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, as a trainer sends them."""
    return dict(model.named_parameters())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["toy", "tied", "qwen3"])
def test_pushed_weights_act_as_if_loaded(tinies: dict[str, Tiny], kind: str, route: str) -> None:
    tiny = tinies[kind]
    engine, new = engine_of(tiny, route=route), learned(tiny)
    before = sample(engine, tiny)
    engine.load_weights(weights(new).items(), version=7)
    after = sample(engine, tiny)
    assert {rollout.weight_version for rollout in before} == {0}
    assert {rollout.weight_version for rollout in after} == {7} and engine.weight_version == 7
    assert outcome(after) != outcome(before)
    assert outcome(after) == outcome(sample(engine_of(tiny, new, route=route), tiny))


def test_the_engine_keeps_a_copy_and_casts(toy: Tiny) -> None:
    new = learned(toy).to(torch.float64)
    engine = engine_of(toy)
    engine.load_weights(((name, tensor) for name, tensor in new.state_dict().items()), version=1)
    first = sample(engine, toy)
    perturb(weights(new))
    assert outcome(sample(engine, toy)) == outcome(first)
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.float32}


def test_a_tied_head_may_come_or_stay_away(tinies: dict[str, Tiny]) -> None:
    tiny = tinies["tied"]
    engine, new = engine_of(tiny), learned(tiny)
    named = dict(new.named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in named
    engine.load_weights(named.items(), version=1)
    both = outcome(sample(engine, tiny))
    named.pop("lm_head.weight")
    engine.load_weights(named.items(), version=2)
    assert outcome(sample(engine, tiny)) == both


def without(named: dict[str, Tensor], name: str) -> Iterator[tuple[str, Tensor]]:
    return ((key, tensor) for key, tensor in named.items() if key != name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "lm_head.weight did not come"),
        ("several", "model.language_model.embed_tokens.weight and [0-9]+ more did not come"),
        ("unknown", "unknown weight lm_heat.weight; the nearest known name is lm_head.weight"),
        ("twice", "lm_head.weight came twice"),
        ("shape", r"lm_head.weight has shape \(1, 2\), the model has \(423, 128\)"),
    ],
)
def test_a_push_that_does_not_fit_is_refused(toy: Tiny, fault: str, message: str) -> None:
    engine, named = engine_of(toy), weights(learned(toy))
    head = ("lm_head.weight", named["lm_head.weight"])
    faulty: dict[str, Any] = {
        "missing": without(named, "lm_head.weight"),
        "several": [(key, tensor) for key, tensor in named.items() if "visual" in key],
        "unknown": [*named.items(), ("lm_heat.weight", head[1])],
        "twice": [*named.items(), head],
        "shape": [*without(named, "lm_head.weight"), ("lm_head.weight", torch.zeros(1, 2))],
    }
    with pytest.raises(WeightsRefused, match=message):
        engine.load_weights(faulty[fault], version=3)
    assert engine.weight_version == 0
    with pytest.raises(WeightsRefused, match="push of version 3"):
        engine.generate(requests(toy), Sampling())
    engine.load_weights(named.items(), version=4)
    assert {rollout.weight_version for rollout in sample(engine, toy)} == {4}


def test_a_push_that_breaks_off_leaves_the_engine_unready(toy: Tiny) -> None:
    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights(learned(toy)).items())[:3]
        raise ConnectionError("peer is gone")

    engine = engine_of(toy)
    with pytest.raises(ConnectionError):
        engine.load_weights(breaks_off(), version=1)
    with pytest.raises(WeightsRefused, match="version 1"):
        engine.generate(requests(toy), Sampling())


def test_a_push_between_two_groups_stops_the_generation(toy: Tiny) -> None:
    engine = NativeEngine(toy.model(), stop_ids=range(100, 140), banned_ids=toy.banned)
    groups = engine.generate(requests(toy, 6), Sampling(max_new_tokens=40))
    next(groups)
    engine.load_weights(weights(learned(toy)).items(), version=1)
    with pytest.raises(RuntimeError, match="pushed while"):
        list(groups)


def test_a_push_after_the_last_group_is_no_fault(toy: Tiny) -> None:
    engine = engine_of(toy)
    groups = engine.generate(requests(toy, 1), Sampling(max_new_tokens=2))
    next(groups)
    engine.load_weights(weights(learned(toy)).items(), version=1)
    assert list(groups) == []


@pytest.mark.parametrize("route", ROUTES)
def test_sleep_keeps_the_weights(toy: Tiny, route: str) -> None:
    engine = engine_of(toy, route=route)
    before = outcome(sample(engine, toy))
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep.*wake"):
        engine.generate(requests(toy), Sampling())
    engine.wake()
    engine.wake()
    assert outcome(sample(engine, toy)) == before


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_push_wakes(toy: Tiny, route: str, keep: bool) -> None:
    engine, new = engine_of(toy, keep_weights=keep, route=route), learned(toy)
    engine.sleep()
    engine.load_weights(weights(new).items(), version=1)
    assert outcome(sample(engine, toy)) == outcome(sample(engine_of(toy, new, route=route), toy))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["toy", "tied"])
def test_sleep_can_drop_the_weights(tinies: dict[str, Tiny], kind: str, route: str) -> None:
    tiny = tinies[kind]
    engine, new = engine_of(tiny, keep_weights=False, route=route), learned(tiny)
    engine.sleep()
    held = {p.untyped_storage().nbytes() for p in engine.model.parameters()}
    assert held == {0}
    engine.wake()
    with pytest.raises(WeightsRefused, match="dropped by sleep"):
        engine.generate(requests(tiny), Sampling())
    engine.load_weights(weights(new).items(), version=2)
    assert outcome(sample(engine, tiny)) == outcome(sample(engine_of(tiny, new, route=route), tiny))


def test_closed_engine(toy: Tiny) -> None:
    engine = engine_of(toy)
    engine.check()
    engine.close()
    engine.close()
    for call in (engine.check, engine.sleep, engine.wake, lambda: sample(engine, toy)):
        with pytest.raises(EngineDead, match="closed"):
            call()


def test_weights_that_are_not_finite_end_in_a_clear_error(toy: Tiny) -> None:
    engine, new = engine_of(toy), learned(toy)
    with torch.no_grad():
        new.lm_head.weight[5] = torch.nan
    engine.load_weights(weights(new).items(), version=9)
    with pytest.raises(EngineDead, match="not finite at version 9"):
        sample(engine, toy)


def test_it_is_a_rollout_engine_without_gradients(toy: Tiny) -> None:
    engine = engine_of(toy)
    assert isinstance(engine, RolloutEngine)
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())
    next(iter(engine.generate(requests(toy), Sampling(max_new_tokens=1))))
    assert not torch.is_inference_mode_enabled(), "the caller's mode must not change"


def test_settings_that_cannot_be(toy: Tiny) -> None:
    for options, message in (
        ({"max_rows": 0}, "max_rows=0"),
        ({"prefill_tokens": 0}, "prefill_tokens=0"),
        ({"route": "quick"}, "'quick': one of auto, fused, generic"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_of(toy, **options)
    with pytest.raises(ValueError, match=r"ids \[-1, 423\] are outside the vocabulary of 423"):
        NativeEngine(toy.model(), stop_ids=[-1, 3], banned_ids=[423])
    with pytest.raises(ValueError, match="Linear has no model.language_model"):
        NativeEngine(nn.Linear(1, 1), stop_ids=[], banned_ids=[])
