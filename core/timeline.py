"""The timeline of a rank: who did what when, as spans on tracks, and when nobody did anything.

    with timeline.span("push", "embeddings", bytes=n):
        ...

Spans may be opened on any thread. What is open on one thread nests; spans of several threads on
one track overlap, and get lanes of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, runtime_checkable

IDLE = "idle"
TRACKS = ("prompts", "generate", "judge", "learn", "push", "evaluate", "save", IDLE)


@dataclass
class Span:
    """A stretch of time on a track. Times are Unix seconds; `args` may be added to while it is
    open, values of JSON's types."""

    track: str
    name: str
    lane: int
    """Of the track: 0, or more where several threads are on it at once."""
    step: int
    start: float
    end: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


@runtime_checkable
class Reporting(Protocol):
    """An engine that has spans of its own to report: the collector sets this to the timeline's.

    In an engine: `span = staticmethod(lambda *given, **args: nullcontext())`, then
    `with self.span("push", "bucket", bytes=n): ...`.
    """

    span: Callable[..., AbstractContextManager[Any]]


class Timeline:
    """Collects the spans of one rank until they are taken.

    A host's view: on a GPU, a span that only launches work ends before the work does.

    Args:
        keep: false measures only, for who has nobody to take the spans.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        # One reading of the wall clock: ranks agree as well as their clocks did at the start, and
        # a clock that is set later moves nothing.
        self._offset = time.time() - time.perf_counter()
        self._lock = threading.Lock()
        self._busy: dict[tuple[str, int], tuple[int, int]] = {}  # track, thread -> lane, depth
        self._done: list[Span] = []
        self._began = self.now()
        self.step = 0
        """Training step that spans opened from now on belong to."""

    def now(self) -> float:
        """Unix seconds, never backwards."""
        return self._offset + time.perf_counter()

    @contextmanager
    def span(self, track: str, name: str = "", **args: Any) -> Iterator[Span]:
        """What is inside takes its place on `track`, under `name` (the track's if empty)."""
        thread = (track, threading.get_ident())
        span = self._open(thread, name or track, args)
        try:
            yield span
        finally:
            self._close(thread, span)

    def _open(self, thread: tuple[str, int], name: str, args: dict[str, Any]) -> Span:
        track = thread[0]
        with self._lock:
            lane, depth = self._busy.get(thread, (-1, 0))
            if not depth:
                taken = {of for (on, _), (of, _) in self._busy.items() if on == track}
                lane = next(free for free in count() if free not in taken)
            self._busy[thread] = (lane, depth + 1)
            return Span(track, name, lane, self.step, self.now(), args=args)

    def _close(self, thread: tuple[str, int], span: Span) -> None:
        with self._lock:
            span.end = self.now()
            lane, depth = self._busy.pop(thread)
            if depth > 1:
                self._busy[thread] = (lane, depth - 1)
            if self.keep:
                self._done.append(span)

    def begin(self, step: int) -> None:
        """A training step begins."""
        self.step = step
        self._began = self.now()

    def finish(self) -> tuple[float, float]:
        """(seconds of the step, seconds of it that no closed span covers), and marks the latter.

        What is idle here: waiting for other ranks, and host work that has no span.
        """
        start, end = self._began, self.now()
        with self._lock:
            idle = gaps([(s.start, s.end) for s in self._done if s.track != IDLE], start, end)
            self._done += [Span(IDLE, IDLE, 0, self.step, a, b) for a, b in idle]
        return end - start, sum(b - a for a, b in idle)

    def take(self) -> list[Span]:
        """The spans closed since the last call."""
        with self._lock:
            done, self._done = self._done, []
        return done


def gaps(
    intervals: Iterable[tuple[float, float]], start: float, end: float
) -> list[tuple[float, float]]:
    """The parts of [start, end] outside the union of `intervals`, in order."""
    out = []
    reached = start
    for first, last in sorted((a, b) for a, b in intervals if a < b):
        if first >= end:
            break
        if first > reached:
            out.append((reached, first))
        reached = max(reached, last)
    if reached < end:
        out.append((reached, end))
    return out
