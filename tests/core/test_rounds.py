"""Rounds of generating and judging: the same data on any number of ranks, with any judge."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from judges import FakeJudge
from speciarl.core.adaptive import Spent, uncertain
from speciarl.core.collect import Collector, JudgedGroup, Timing, codes_matrix
from speciarl.core.config import Config
from speciarl.core.examples import Example
from speciarl.core.report import step_scalars
from speciarl.core.rounds import Rounds
from speciarl.core.settings import load
from speciarl.core.timeline import Timeline
from speciarl.judge.base import Pair
from speciarl.kernels.codes import S_MINUS, G, S, W
from speciarl.kernels.reward import RewardSpec, best_of_n_numpy
from speciarl.rollout.engine import Group, Prompt, Request, Rollout, Sampling
from threadranks import Rank, on_ranks

PROMPTS = 8
EXAMPLES = [Example(f"d/{i}", Path("x.png"), "robin", "d", "birds") for i in range(99)]
ADAPTIVE = ("rollout.n=5", "rollout.n_start=2", "rollout.n_max=11")
DAPO = ("objective.algorithm=dapo", "objective.max_refills=3")
Found = tuple[list[JudgedGroup], Timing]


class Engine:
    """Sample i of image k says "k:i"; those in `lost` it keeps back. The last group comes first."""

    def __init__(self, lost: Sequence[str] = (), ranks: int = 1) -> None:
        self.ranks = ranks
        self.lost = lost
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.awake = False

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        assert self.awake
        self.asked += [(request.group_key, request.sample_ids) for request in requests]
        for request in reversed(requests):
            key = request.group_key
            number = int(key.removeprefix("d/"))
            kept = [i for i in request.sample_ids if f"{number}:{i}" not in self.lost]
            rollouts = [
                Rollout(request.prompt, key, i, [number, i], [-1.0, -2.0], "stop", sampling.step)
                for i in kept
            ]
            yield Group(key, rollouts)

    def wake(self) -> None:
        self.awake = True

    def sleep(self) -> None:
        self.awake = False


def verdict(pair: Pair) -> int:
    """Image k is easy (k % 4 = 0: all specific), hopeless (1), or its only sample of a category
    above wrong comes late (2: the fourth; 3: the third and the sixth)."""
    image, sample = map(int, pair.prediction.split(":"))
    return {
        0: S,
        1: W,
        2: S if sample == 3 else W,
        3: S_MINUS if sample in (2, 5) else G,
    }[image % 4]


def rounds(rank: Any, words: Sequence[str], concurrent: bool, engine: Engine) -> Rounds:
    config = load(Config, [], [f"train.prompts={PROMPTS}", "train.mini_batch=4", *words])
    builder = SimpleNamespace(decode=lambda ids: f"<answer>{ids[0]}:{ids[1]}</answer>")
    judge = FakeJudge(verdict, concurrent=concurrent)
    drawn = iter(EXAMPLES)

    def live(groups: Sequence[JudgedGroup]) -> np.ndarray:
        return best_of_n_numpy(codes_matrix(groups), config.reward, normalize=True).live

    def need(example: Example) -> Prompt:
        ids = torch.arange(5)
        return Prompt(example.key, ids, ids.expand(3, -1), {}, example.truth)

    parts = SimpleNamespace(
        stream=SimpleNamespace(draw=lambda count: [next(drawn) for _ in range(count)]),
        data=SimpleNamespace(store=SimpleNamespace(need=need)),
        collector=Collector(engine, judge, builder, config.judge),  # type: ignore[arg-type]
        learner=SimpleNamespace(live=live),
        timeline=Timeline(),
    )
    return Rounds(config, rank, parts)  # type: ignore[arg-type]


def collected(
    size: int, *words: str, concurrent: bool = True, lost: Sequence[str] = (), together: int = 1
) -> tuple[Found, list[Engine]]:
    """What rank 0 collects, and the engines of all; the other ranks collect the same."""
    engines = [Engine(lost, together) for _ in range(size)]

    def work(rank: Rank) -> Found:
        made = rounds(rank, words, concurrent, engines[rank.rank])
        found = made.collect(7)
        made.parts.collector.close()
        return found

    found = on_ranks(size, work)
    assert all(groups == found[0][0] for groups, _ in found)
    assert all(timing.spent == found[0][1].spent for _, timing in found)
    return found[0], engines


@pytest.mark.parametrize("words", [ADAPTIVE, (*ADAPTIVE, *DAPO)])
def test_ranks_and_judges_change_neither_the_plan_nor_the_data(words: tuple[str, ...]) -> None:
    (groups, timing), _ = collected(1, *words)
    for size in (1, 2, 3):
        for concurrent in (True, False):
            (others, other), engines = collected(size, *words, concurrent=concurrent)
            assert others == groups and other.spent == timing.spent
            asked = [(key, ids) for engine in engines for key, ids in engine.asked]
            assert sum(len(ids) for _, ids in asked) == timing.spent.asked
            assert timing.spent.asked <= timing.spent.budget
            assert len({(key, i) for key, ids in asked for i in ids}) == timing.spent.asked


def test_of_ranks_that_share_an_engine_the_first_samples() -> None:
    (groups, timing), _ = collected(1, *ADAPTIVE)
    (others, other), engines = collected(4, *ADAPTIVE, together=2)
    assert others == groups and other.spent == timing.spent
    assert [bool(engine.asked) for engine in engines] == [True, False, True, False]


def test_samples_go_where_the_bar_is_uncertain_until_the_budget_is_spent() -> None:
    (groups, timing), (engine,) = collected(1, *ADAPTIVE)
    # Rounds of 16 and 12 completions; 12 of the budget of 40 are left, 2 for each of 6 groups.
    assert [len(group.completions) for group in groups] == [2, 6, 6, 6] * 2
    assert timing.spent == Spent(prompts=8, rounds=3, asked=40, budget=40, uncertain=4)
    assert [ids for key, ids in engine.asked if key == "d/3"] == [(0, 1), (2, 3), (4, 5)]
    assert uncertain(codes_matrix(groups)).tolist() == [False, True, True, False] * 2
    for group in groups:
        assert [c.ids[1] for c in group.completions] == list(range(len(group.completions)))
        assert {c.version for c in group.completions} == {7}


def test_a_large_budget_is_not_used_up() -> None:
    (groups, timing), _ = collected(2, "rollout.n=9", "rollout.n_start=2", "rollout.n_max=9")
    assert [len(group.completions) for group in groups] == [2, 9, 9, 6] * 2
    assert timing.spent == Spent(prompts=8, rounds=5, asked=52, budget=72, uncertain=4)


def test_each_refill_of_dynamic_sampling_has_a_budget_of_its_own() -> None:
    (groups, timing), _ = collected(1, *ADAPTIVE, *DAPO)
    # Two images of four have signal: those whose only samples above the rest come late.
    assert len(groups) == PROMPTS and {len(group.completions) for group in groups} == {6}
    assert timing.spent == Spent(prompts=16, rounds=6, asked=80, budget=80, uncertain=8)


def test_n_at_once_is_one_round() -> None:
    (groups, timing), (engine,) = collected(1, "rollout.n=5")
    assert {len(group.completions) for group in groups} == {5}
    assert [ids for _, ids in engine.asked] == [(0, 1, 2, 3, 4)] * PROMPTS
    assert timing.spent.rounds == 1 and timing.spent.asked == timing.spent.budget == 40


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("words", [("rollout.n=4",), ADAPTIVE])
def test_what_the_engine_loses_is_left_out_and_a_group_without_any_counted(
    words: tuple[str, ...], concurrent: bool
) -> None:
    lost = [*(f"1:{i}" for i in range(12)), "2:0", "3:1"]
    (groups, timing), _ = collected(2, *words, concurrent=concurrent, lost=lost)
    assert [group.example.key for group in groups] == [f"d/{i}" for i in (0, 2, 3, 4, 5, 6, 7)]
    assert timing.spent.empty == 1 and timing.spent.asked <= timing.spent.budget
    by_key = {g.example.key: [c.ids[1] for c in g.completions] for g in groups}
    assert by_key["d/2"][:3] == [1, 2, 3] and by_key["d/3"][:3] == [0, 2, 3]
    alone = SimpleNamespace(gather=lambda value: [value])
    config = load(Config, [], list(words))
    times = {"time/generate": 1.0, "time/learn": 1.0}
    scalars = step_scalars(config, groups, None, timing, times, alone)  # type: ignore[arg-type]
    assert scalars["groups/count"] == 7 and scalars["groups/empty"] == 1
    assert scalars["completions/count"] == sum(map(len, by_key.values()))
    assert scalars["completions/lost"] == timing.spent.asked - scalars["completions/count"]
    assert scalars["rate/unscored"] == 0
    assert sum(v for name, v in scalars.items() if name.startswith("rate/")) == pytest.approx(1)
    assert ("adaptive/rounds" in scalars) == (words == ADAPTIVE)
    rewards = [
        best_of_n_numpy(codes_matrix([g]), RewardSpec(), normalize=True).rewards.ravel()
        for g in groups
    ]
    assert scalars["reward/mean"] == pytest.approx(np.concatenate(rewards).mean())


def test_an_engine_that_gives_nothing_ends_the_step_on_every_rank() -> None:
    lost = [f"{k}:{i}" for k in range(PROMPTS) for i in range(4)]

    def work(rank: Rank) -> str:
        made = rounds(rank, ("rollout.n=4",), True, Engine(lost))
        with pytest.raises(RuntimeError, match="step 7: the engine gave no completion") as caught:
            made.collect(7)
        made.parts.collector.close()
        return str(caught.value)

    assert all(on_ranks(2, work))
