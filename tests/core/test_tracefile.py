"""trace.json: its format, several ranks, resumed runs, kills."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import threadranks
from speciarl.core.timeline import IDLE, Span
from speciarl.core.tracefile import TraceFile
from threadranks import Rank, on_ranks
from tracecheck import read_trace

ALONE: Any = SimpleNamespace(rank=0, size=1, main=True, gather=lambda value: [value])
START = 1.7e9


def step_spans(step: int, late: float = 0.0) -> list[Span]:
    """A step of two seconds: generating and judging side by side, then a pause, then learning."""
    at = START + 10 * step + late
    return [
        Span("judge", "grade", 1, step, at + 0.6, at + 1.2),
        Span("judge", "grade", 0, step, at + 0.5, at + 0.9, {"completions": 4}),
        Span("generate", "generate", 0, step, at, at + 1, {"tokens": 9}),
        Span("learn", "optimizer", 0, step, at + 1.9, at + 2),
        Span("learn", "learn", 0, step, at + 1.4, at + 2),
        Span(IDLE, IDLE, 0, step, at + 1.2, at + 1.4),
        Span("engine's own", 'Ünïcode "name"', 0, step, at, at + 0.5),
    ]


def write(folder: Path, steps: range, keep: int, first: int = 0) -> TraceFile:
    file = TraceFile(folder, ALONE, keep)
    file.start(first)
    for step in steps:
        file.add(step, step_spans(step))
    return file


def by_step(folder: Path) -> list[int]:
    return sorted({span["args"]["step"] for span in read_trace(folder / "trace.json")})


def test_every_event_has_its_fields_and_its_place(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), -1)
    spans = read_trace(tmp_path / "trace.json")
    assert len(spans) == 14 and spans[0]["ts"] == 0
    first = {(s["thread"], s["name"]): s for s in spans if s["args"]["step"] == 1}
    assert first["judge", "grade"]["args"] == {"step": 1, "completions": 4}
    assert first["judge 2", "grade"]["ts"] == pytest.approx(600_000, abs=1)
    assert first["judge 2", "grade"]["dur"] == pytest.approx(600_000, abs=1)
    assert first["engine's own", 'Ünïcode "name"']["cat"] == "engine's own"
    assert {s["process"] for s in spans} == {"rank 0"} and {s["pid"] for s in spans} == {0}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    listed = [names[tid] for tid in sorted(order, key=order.__getitem__)]
    assert listed == ["generate", "judge", "judge 2", "learn", IDLE, "engine's own"]


def test_ranks_are_processes_on_one_clock(tmp_path: Path) -> None:
    def work(rank: Rank) -> None:
        file = TraceFile(tmp_path, rank, 5)  # type: ignore[arg-type]
        file.start(0)
        for step in (1, 2):
            file.add(step, step_spans(step, late=0.25 * rank.rank))

    on_ranks(2, work)
    spans = read_trace(tmp_path / "trace.json")
    assert {(s["pid"], s["process"]) for s in spans} == {(0, "rank 0"), (1, "rank 1")}
    starts = {(s["pid"], s["args"]["step"]): s["ts"] for s in spans if s["name"] == "generate"}
    assert starts == {
        (0, 1): 0,
        (1, 1): pytest.approx(250_000, abs=1),
        (0, 2): pytest.approx(10_000_000, abs=1),
        (1, 2): pytest.approx(10_250_000, abs=1),
    }
    tids = {(s["pid"], s["thread"]): s["tid"] for s in spans}
    assert len(set(tids.values())) == len(tids) == 12


@pytest.mark.parametrize(("keep", "expected"), [(0, []), (2, [1, 2]), (9, [1, 2, 3, 4])])
def test_as_many_steps_are_written_as_are_wanted(
    keep: int, expected: list[int], tmp_path: Path
) -> None:
    write(tmp_path, range(1, 5), keep)
    assert (by_step(tmp_path) if keep else list(tmp_path.iterdir())) == expected


def test_a_rank_that_writes_nothing_is_not_even_asked(tmp_path: Path) -> None:
    silent = SimpleNamespace(gather=lambda value: pytest.fail("gathered"), main=True)
    TraceFile(tmp_path, silent, 0).add(1, step_spans(1))  # type: ignore[arg-type]


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5), -1)
    before = [s for s in read_trace(tmp_path / "trace.json") if s["args"]["step"] <= 2]
    write(tmp_path, range(3, 9), 3, first=2)  # steps 3 and 4 had not been saved
    assert by_step(tmp_path) == [1, 2, 3, 4, 5]
    spans = read_trace(tmp_path / "trace.json")
    assert spans[: len(before)] == before and len(spans) == 5 * 7
    assert {s["tid"] for s in spans} == {s["tid"] for s in before}
    again = [s["ts"] for s in spans if s["name"] == "generate"]
    assert again == pytest.approx([10_000_000 * k for k in range(5)], abs=1)


def test_a_resumed_run_without_tracing_leaves_the_file_alone(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), -1)
    content = (tmp_path / "trace.json").read_bytes()
    write(tmp_path, range(2, 4), 0, first=1)
    assert (tmp_path / "trace.json").read_bytes() == content


@pytest.mark.parametrize("content", ['{"traceEvents": [', "[]", "{}", '{"otherData": 3}'])
def test_what_is_no_trace_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(content)
    write(tmp_path, range(2, 4), -1, first=1)
    assert by_step(tmp_path) == [2, 3]


def test_a_run_that_starts_afresh_keeps_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9), -1)
    write(tmp_path, range(1, 2), -1)
    assert by_step(tmp_path) == [1]


KILLED = """
import itertools, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_tracefile import ALONE, step_spans
from speciarl.core.tracefile import TraceFile
file = TraceFile(Path(sys.argv[1]), ALONE, -1)
file.start(0)
for step in itertools.count(1):
    file.add(step, step_spans(step))
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    folders = [str(Path(module).parent) for module in (__file__, threadranks.__file__)]
    words = [sys.executable, "-c", KILLED, str(tmp_path), *folders]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        seen = [int(run.stdout.readline()) for _ in range(8)]
        for _ in range(20):  # read while it writes
            json.loads((tmp_path / "trace.json").read_text())
        run.kill()
    record = json.loads((tmp_path / "trace.json").read_text())
    steps = {e["args"]["step"] for e in record["traceEvents"] if e["ph"] == "X"}
    assert steps == set(range(1, max(steps) + 1)) and max(steps) >= max(seen)
