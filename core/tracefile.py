"""`trace.json` of a run: timelines of all ranks in the Trace Event Format, for ui.perfetto.dev.

The format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Google). The
JSON object form with complete events ("X", microseconds): a process is a rank, a thread is a track
or one of its lanes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speciarl.core.timeline import TRACKS, Span
from speciarl.core.world import World

TRACE = "trace.json"
_LANES = 1000  # between the places of two tracks


class TraceFile:
    """Writes the timelines of a run's first steps, or of all.

    Rank 0 rewrites the whole file after every step and renames it into place, so that it is valid
    at any moment, whatever is killed. That suits some thousand steps, not a million.

    Args:
        folder: of the run.
        steps: how many steps from `start` on are written; -1: all.
    """

    def __init__(self, folder: Path, world: World, steps: int) -> None:
        self.path = folder / TRACE
        self.world = world
        self.steps = steps
        self._first = 0
        self._origin: float | None = None
        self._threads: dict[tuple[int, str], int] = {}
        self._lines: list[str] = []

    def start(self, step: int) -> None:
        """The run begins (step 0) or goes on after `step`: what the file holds of later steps is
        dropped with the next write, the rest kept. A file that is no trace is replaced."""
        self._first = step
        if not (step and self.steps and self.world.main and self.path.exists()):
            return
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            self._origin = float(record["otherData"]["origin"])
            events = record["traceEvents"]
        except (ValueError, TypeError, KeyError):
            return
        for event in events:
            if event["ph"] == "X" and event["args"]["step"] > step:
                continue
            if event["name"] == "thread_name":
                self._threads[event["pid"], event["args"]["name"]] = event["tid"]
            self._lines.append(_line(event))

    def wants(self, step: int) -> bool:
        """Whether what is added after `step` is written."""
        return self.steps < 0 or self._first < step <= self._first + self.steps

    def add(self, step: int, spans: list[Span]) -> None:
        """Adds what every rank did up to the end of `step`. Collective where it is wanted."""
        if not self.wants(step):
            return
        ranks = self.world.gather(spans)
        if not self.world.main:
            return
        if self._origin is None:
            self._origin = min((s.start for part in ranks for s in part), default=0.0)
        for rank, part in enumerate(ranks):
            for span in sorted(part, key=lambda s: (s.start, -s.end)):
                self._lines.append(_line(self._event(rank, span, self._origin)))
        self._write()

    def _event(self, rank: int, span: Span, origin: float) -> dict[str, Any]:
        # Whole microseconds of both ends, so that rounding makes no two spans overlap.
        start, end = (int((moment - origin) * 1e6) for moment in (span.start, span.end))
        return {
            "name": span.name,
            "cat": span.track,
            "ph": "X",
            "ts": start,
            "dur": end - start,
            "pid": rank,
            "tid": self._thread(rank, span),
            "args": {"step": span.step, **span.args},
        }

    def _thread(self, rank: int, span: Span) -> int:
        """The thread's number, different for all threads of the file; named when it is new."""
        label = f"{span.track} {span.lane + 1}" if span.lane else span.track
        if (rank, label) not in self._threads:
            if all(pid != rank for pid, _ in self._threads):
                self._name(rank, 0, "process", f"rank {rank}", rank)
            self._threads[rank, label] = len(self._threads) + 1
            known = span.track in TRACKS
            place = TRACKS.index(span.track) if known else len(TRACKS)
            self._name(rank, len(self._threads), "thread", label, place * _LANES + span.lane)
        return self._threads[rank, label]

    def _name(self, pid: int, tid: int, kind: str, name: str, place: int) -> None:
        """Metadata events: a process's or thread's name, and its place among the others."""
        for what, args in (("name", {"name": name}), ("sort_index", {"sort_index": place})):
            event = {"name": f"{kind}_{what}", "ph": "M", "ts": 0, "pid": pid, "tid": tid}
            self._lines.append(_line(event | {"args": args}))

    def _write(self) -> None:
        head = {"displayTimeUnit": "ms", "otherData": {"origin": self._origin}}
        text = json.dumps(head)[:-1] + ', "traceEvents": [\n' + ",\n".join(self._lines) + "\n]}\n"
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False)
