"""A judge beside an engine: who sleeps when, figures, noise, signs of life, limits of faults."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from judges import FakeJudge
from speciarl.core import verdicts
from speciarl.core.collect import Collector, JudgedGroup
from speciarl.core.evaluation import EvaluationConfig
from speciarl.core.examples import Example
from speciarl.core.verdicts import Watch, all_ranks, judge_scalars, summed, too_many_faults
from speciarl.judge.base import Pair
from speciarl.judge.settings import JudgeConfig
from speciarl.kernels.codes import ABSENT, FORMAT, S_MINUS, S, W
from speciarl.rollout.engine import Group, Prompt, Request, Rollout, Sampling

EVENTS = ["engine wake", "generate", "engine sleep", "wake", "grade 6", "sleep"]


class Engine:
    """Each sample says its number; the last prompt is ready first."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        self.events.append("generate")
        for request in reversed(requests):
            yield Group(
                request.group_key,
                [
                    Rollout(request.prompt, request.group_key, i, [i], [-1.0], "stop", 0)
                    for i in request.sample_ids
                ],
            )

    def sleep(self) -> None:
        self.events.append("engine sleep")

    def wake(self) -> None:
        self.events.append("engine wake")


def collector(judge: FakeJudge, config: JudgeConfig | None = None) -> Collector:
    judge.events = events = ["made"]
    builder = SimpleNamespace(
        decode=lambda ids: f"<answer>{ids[0]}</answer>" if ids[0] < 9 else "no answer"
    )
    return Collector(Engine(events), judge, builder, config or JudgeConfig())  # type: ignore[arg-type]


def work(*keys: str) -> list[tuple[Example, Prompt]]:
    ids = torch.arange(4)
    return [
        (
            Example(key, Path("x.png"), f"truth of {key}", "d", "birds"),
            Prompt(key, ids, ids.expand(3, -1), {}, "robin"),
        )
        for key in keys
    ]


def codes(groups: Sequence[JudgedGroup]) -> dict[str, list[int]]:
    return {g.example.key: [c.code for c in g.completions] for g in groups}


def graded(judge: FakeJudge, n: int = 3, config: JudgeConfig | None = None, step: int = 0) -> Any:
    machine = collector(judge, config)
    groups, timing = machine.collect(work("a", "b"), n, Sampling(step=step))
    machine.close()
    return groups, timing, judge


def number(pair: Pair) -> int | None:
    return (W, S, None)[int(pair.prediction) % 3]


def test_a_judge_on_the_engines_device_gets_everything_in_one_call_between_two_sleeps() -> None:
    groups, timing, judge = graded(FakeJudge(number, concurrent=False))
    assert judge.events == ["made", *EVENTS]
    assert codes(groups) == {"a": [W, S, ABSENT], "b": [W, S, ABSENT]}
    assert [pair.truth for pair in judge.asked] == ["truth of a"] * 3 + ["truth of b"] * 3
    assert timing.verdicts["pairs"] == 6 and timing.verdicts["faults"] == 2
    assert timing.verdicts["fault: broken"] == 2 and timing.tokens == 6
    other, _, apart = graded(FakeJudge(number))
    assert codes(other) == codes(groups)
    assert sorted(apart.events) == sorted(["made", *EVENTS[:2], "grade 3", "grade 3"])


def test_rounds_of_one_step_wake_the_engine_again() -> None:
    machine = collector(FakeJudge(number, concurrent=False))
    for _ in range(2):
        machine.collect(work("a", "b"), 3, Sampling())
    machine.close()
    assert machine.judge.events == ["made", *EVENTS, *EVENTS]  # type: ignore[attr-defined]


def test_noise_belongs_to_the_sample_of_a_step_and_to_nothing_else() -> None:
    def judge(pair: Pair) -> int | None:
        return None if pair.prediction == "0" else S_MINUS

    config = JudgeConfig(noise=0.5, noise_seed=3)
    groups = codes(graded(FakeJudge(judge), 12, config)[0])
    assert groups == codes(graded(FakeJudge(judge, concurrent=False), 12, config)[0])
    machine = collector(FakeJudge(judge), config)
    alone = machine.collect(work("b"), 12, Sampling())[0]
    machine.close()
    assert codes(alone)["b"] == groups["b"]
    for given in groups.values():
        assert given[0] == ABSENT and given[9:] == [FORMAT] * 3
        assert {abs(code - S_MINUS) for code in given[1:9]} == {0, 1}
    assert groups["a"] != groups["b"]
    assert groups != codes(graded(FakeJudge(judge), 12, config, step=1)[0])
    other = JudgeConfig(noise=0.5, noise_seed=4)
    assert groups != codes(graded(FakeJudge(judge), 12, other)[0])


def test_evaluation_by_the_same_judge_has_no_noise() -> None:
    training = JudgeConfig(noise=0.5, workers=3)
    assert EvaluationConfig().judged_by(training) == JudgeConfig(workers=3)
    own = JudgeConfig(noise=0.1)
    assert EvaluationConfig(judge=own).judged_by(training) is own


def test_figures_of_a_step() -> None:
    rank = {"pairs": 10.0, "by_rule": 4.0, "by_batch": 2.0, "by_cache": 1.0, "model_calls": 4.0}
    rank |= {"retries": 1.0, "queue_seconds": 2.0, "votes": 8.0, "agreement": 6.0, "seconds": 2.0}
    together = all_ranks([rank, {**rank, "seconds": 5.0, "faults": 1.0, "fault: busy": 1.0}])
    assert judge_scalars(together) == {
        "judge/verdicts_per_s": 4.0,
        "judge/by_rule": pytest.approx(0.4),
        "judge/by_batch": pytest.approx(0.2),
        "judge/by_cache": pytest.approx(0.1),
        "judge/model_calls": 8.0,
        "judge/faults": 1.0,
        "judge/queue_s": pytest.approx(0.5),
        "judge/agreement": 0.75,
    }
    assert summed([rank, rank])["seconds"] == 4.0
    assert judge_scalars({}) == {"judge/faults": 0.0, "judge/model_calls": 0.0}


def test_a_watch_sees_its_own_time_only() -> None:
    judge = FakeJudge(number)
    judge.grade([Pair("x", "1")])
    watch = Watch(judge)
    assert watch.figures()["model_calls"] == 0 and watch.figures()["seconds"] == 0
    watch.grade([Pair("x", "1"), Pair("x", "2")])
    figures = watch.figures()
    assert (figures["model_calls"], figures["pairs"], figures["faults"]) == (2, 2, 1)
    assert watch.progress(9) == (
        "judging 9 completions: 0 verdicts without the model, 2 questions to it, 1 faults"
    )


def test_long_grading_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    told, lines = Event(), []

    def tell(text: str) -> None:
        lines.append(text)
        told.set()

    def slow(pair: Pair) -> int:
        assert told.wait(20)
        return S

    monkeypatch.setattr(verdicts, "TELL_EVERY", 0.001)
    for concurrent in (True, False):
        told.clear()
        machine = collector(FakeJudge(slow, concurrent=concurrent))
        machine.tell = tell
        machine.collect(work("a", "b"), 2, Sampling())
        machine.close()
    assert lines[0].startswith("judging 4 completions: 0 verdicts")


@pytest.mark.parametrize(
    ("pairs", "faults", "limit", "stops"),
    [
        (10, 5, 0.5, False),
        (10, 6, 0.5, True),
        (10, 1, 0.0, True),
        (10, 9, 1.0, False),
        (10, 10, 1.0, True),
        (0, 0, 0.0, False),
    ],
)
def test_too_many_faults(pairs: int, faults: int, limit: float, stops: bool) -> None:
    figures = {"pairs": pairs, "faults": faults, "fault: busy": 1, "fault: timeout": faults - 1}
    text = too_many_faults(figures, limit)
    assert (text is not None) == stops
    if text:
        assert text.startswith(f"{faults} of {pairs} answers got no verdict (judge.max_fault_share")
        assert faults < 3 or f"the judge reported timeout ({faults - 1}); busy (1)" in text
