"""Spans and what they leave uncovered; generating and judging side by side."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from judges import FakeJudge
from speciarl.core.collect import Collector
from speciarl.core.examples import Example
from speciarl.core.timeline import IDLE, Reporting, Span, Timeline, gaps
from speciarl.judge.base import Pair
from speciarl.judge.settings import JudgeConfig
from speciarl.kernels.codes import S
from speciarl.rollout.engine import Group, Prompt, Request, Rollout, Sampling

moments = st.integers(0, 30)


@given(st.lists(st.tuples(moments, moments).map(sorted)), moments, moments)
def test_gaps_are_what_no_interval_covers(intervals: list[list[int]], one: int, other: int) -> None:
    """Against brute force: every unit of time is looked at by itself."""
    start, end = sorted((one, other))
    found = gaps([(a, b) for a, b in intervals], start, end)
    units = {u for a, b in found for u in range(int(a), int(b))}
    assert units == {u for u in range(start, end) if not any(a <= u < b for a, b in intervals)}
    assert all(a < b for a, b in found)
    assert all(b < c for (_, b), (c, _) in zip(found, found[1:], strict=False))


def spans_by_name(timeline: Timeline) -> dict[str, Span]:
    return {span.name: span for span in timeline.take()}


def test_spans_of_one_thread_nest_in_one_lane_and_of_several_have_their_own() -> None:
    timeline, inside, go = Timeline(), threading.Barrier(3), threading.Event()
    timeline.step = 5

    def work(name: str) -> None:
        with timeline.span("judge", name), timeline.span("judge", f"{name} inside", pairs=2):
            inside.wait(10)
            go.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    with timeline.span("learn"):
        inside.wait(10)
    go.set()
    for thread in threads:
        thread.join()
    with timeline.span("judge", "later"):
        pass
    found = spans_by_name(timeline)
    assert {found["a"].lane, found["b"].lane} == {0, 1}
    assert found["a inside"].lane == found["a"].lane and found["later"].lane == 0
    assert found["a"].start <= found["a inside"].start <= found["a inside"].end <= found["a"].end
    assert found["a inside"].args == {"pairs": 2} and found["learn"].name == "learn"
    assert {span.step for span in found.values()} == {5}
    assert timeline.take() == []


def test_a_timeline_that_keeps_nothing_still_measures() -> None:
    timeline = Timeline(keep=False)
    with timeline.span("learn") as span:
        time.sleep(0.01)
    assert span.seconds >= 0.01 and timeline.take() == []


def test_what_a_step_does_not_explain_is_idle() -> None:
    timeline = Timeline()
    with timeline.span("evaluate"):  # before the step: it explains nothing of it
        time.sleep(0.01)
    timeline.begin(3)
    time.sleep(0.02)
    with timeline.span("generate"):
        time.sleep(0.01)
    with pytest.raises(ValueError), timeline.span("learn"):
        raise ValueError  # a span that fails has been, too
    time.sleep(0.02)
    whole, idle = timeline.finish()
    spans = timeline.take()
    slices = [span for span in spans if span.track == IDLE]
    covered = sum(span.seconds for span in spans if span.track in ("generate", "learn"))
    assert len(slices) == 3 and {span.step for span in slices} == {3}
    assert idle == pytest.approx(sum(span.seconds for span in slices))
    assert whole == pytest.approx(idle + covered) and 0.04 <= idle < whole
    assert abs(spans[0].start - time.time()) < 5  # the wall clock's seconds


class Engine:
    """Reports what it does; its second group is not done before the judge began on the first."""

    def __init__(self) -> None:
        self.span: Any = lambda *given, **args: nullcontext()
        self.second, self.judging = threading.Event(), threading.Event()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        for index, request in enumerate(requests):
            with self.span("generate", "decode", rows=len(request.sample_ids)):
                if index == 1:
                    self.second.set()
                    self.judging.wait(10)
            key = request.group_key
            yield Group(key, [Rollout(request.prompt, key, 0, [0], [-1.0], "stop", 0)])

    def wake(self) -> None: ...

    def sleep(self) -> None: ...


def collect(concurrent: bool) -> list[Span]:
    engine = Engine()
    if not concurrent:
        engine.judging.set()

    def answer(pair: Pair) -> int:
        engine.judging.set()
        assert engine.second.wait(10)
        return S

    timeline = Timeline()
    builder = SimpleNamespace(decode=lambda ids: "<answer>robin</answer>")
    machine = Collector(
        engine,  # type: ignore[arg-type]
        FakeJudge(answer, concurrent=concurrent),
        builder,  # type: ignore[arg-type]
        JudgeConfig(workers=4),
        timeline=timeline,
    )
    ids = torch.arange(4)
    prompt = Prompt("p", ids, ids.expand(3, -1), {}, "robin")
    work = [(Example(f"d/{i}", Path("x.png"), "robin", "d", "birds"), prompt) for i in range(3)]
    timeline.begin(1)
    machine.collect(work, 1, Sampling())
    timeline.finish()
    machine.close()
    return timeline.take()


def test_grading_shows_beside_generating_and_the_engine_reports_too() -> None:
    assert isinstance(Engine(), Reporting)
    spans = collect(concurrent=True)
    (whole,) = [s for s in spans if s.name == "generate"]
    decodes = [s for s in spans if s.name == "decode"]
    grades = [s for s in spans if s.name == "grade"]
    assert whole.args == {"prompts": 3, "tokens": 3}
    assert [s.args for s in grades] == [{"completions": 1}] * 3
    assert [s.args for s in decodes] == [{"rows": 1}] * 3
    assert all(whole.start <= s.start and s.end <= whole.end for s in decodes)
    assert any(decodes[1].start < s.end and s.start < decodes[1].end for s in grades)
    total = max(s.end for s in spans) - min(s.start for s in spans)
    assert sum(s.seconds for s in spans if s.track == IDLE) < total


def test_a_judge_in_turn_shows_after_generating() -> None:
    spans = collect(concurrent=False)
    names = [s.name for s in sorted(spans, key=lambda s: s.start) if s.track != IDLE]
    outer = [name for name in names if name not in ("decode", "wake", "sleep")]
    assert outer == ["generate", "grade"]
    (whole,) = [s for s in spans if s.name == "generate"]
    (grade,) = [s for s in spans if s.name == "grade"]
    assert grade.start >= whole.end and grade.args == {"completions": 3}
