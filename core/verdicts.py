"""What a step asked its judge: figures for the log, signs of life, and when to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from speciarl.judge.base import Judge, Pair, Verdict, Wrapper

TELL_EVERY = 30.0  # seconds between signs of life of a long grading
FAULT = "fault: "  # in front of a reason
Figures = dict[str, float]
_ANSWERED = ("by_rule", "by_batch", "by_cache")
_WIDEST_REASON = 200


class Watch(Wrapper):
    """A judge, watched for the time of one collection.

    counts: "pairs", "faults", "fault: <reason>"; `figures` adds what the judge's own tally gained.
    """

    def __init__(self, inner: Judge) -> None:
        super().__init__(inner)
        self._before = inner.tally()
        self._first = float("inf")
        self._last = 0.0

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """What the judge says."""
        self._first = min(self._first, time.perf_counter())
        verdicts = self.inner.grade(pairs)
        self._last = time.perf_counter()
        self.counts.add("pairs", len(pairs))
        for verdict in verdicts:
            if verdict.category is None:
                self.counts.add("faults")
                self.counts.add(FAULT + verdict.source[:_WIDEST_REASON])
        return verdicts

    def figures(self) -> Figures:
        """Counters of this time, and "seconds" from the first question to the last answer."""
        gained = {k: v - self._before.get(k, 0.0) for k, v in self.inner.tally().items()}
        own = {"pairs": 0.0, "faults": 0.0, **self.counts.snapshot()}
        return {**gained, **own, "seconds": max(0.0, self._last - self._first)}

    @contextmanager
    def telling(self, tell: Callable[[str], None] | None, asked: int) -> Iterator[None]:
        """Inside, `tell` gets a line every half minute about the completions, `asked` in all."""
        if tell is None:
            yield
            return
        done = threading.Event()

        def report() -> None:
            while not done.wait(TELL_EVERY):
                tell(self.progress(asked))

        thread = threading.Thread(target=report, name="judge progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def progress(self, asked: int) -> str:
        """How far the grading is, in words."""
        now = self.figures()
        known = sum(now.get(name, 0.0) for name in _ANSWERED)
        return (
            f"judging {asked} completions: {known:.0f} verdicts without the model, "
            f"{now.get('model_calls', 0.0):.0f} questions to it, {now['faults']:.0f} faults"
        )


def summed(parts: Iterable[Mapping[str, float]]) -> Figures:
    """Figures of several rounds added up."""
    total: Figures = {}
    for figures in parts:
        for name, value in figures.items():
            total[name] = total.get(name, 0.0) + value
    return total


def all_ranks(parts: Sequence[Mapping[str, float]]) -> Figures:
    """Figures of all ranks together: sums, and the longest of "seconds"."""
    return {**summed(parts), "seconds": max(figures["seconds"] for figures in parts)}


def judge_scalars(figures: Mapping[str, float]) -> dict[str, float]:
    """Scalars of a step, "judge/...", from its figures, all ranks together.

    by_rule, by_batch, by_cache: shares of the pairs that were answered this way; what is left to
    1 went to the model. verdicts_per_s; model_calls and faults: counts; queue_s: mean wait of a
    question before it was sent; agreement: mean share of a panel that agrees with its vote.
    """
    pairs = figures.get("pairs", 0.0)
    scalars = {"judge/faults": figures.get("faults", 0.0)}
    if seconds := figures.get("seconds"):
        scalars["judge/verdicts_per_s"] = pairs / seconds
    asked = figures.get("model_calls", 0.0)
    ways = {name: figures.get(name, 0.0) for name in _ANSWERED}
    if total := sum(ways.values()) + asked - figures.get("retries", 0.0):
        scalars.update({f"judge/{name}": count / total for name, count in ways.items()})
    scalars["judge/model_calls"] = asked
    if asked and "queue_seconds" in figures:
        scalars["judge/queue_s"] = figures["queue_seconds"] / asked
    if votes := figures.get("votes"):
        scalars["judge/agreement"] = figures["agreement"] / votes
    return scalars


def too_many_faults(figures: Mapping[str, float], limit: float) -> str | None:
    """What to say when no pair of a step has a verdict, or more than `limit` of them have none;
    None when the run may go on."""
    pairs, faults = figures.get("pairs", 0.0), figures.get("faults", 0.0)
    if not faults or (faults < pairs and faults <= limit * pairs):
        return None
    reasons = [(v, k.removeprefix(FAULT)) for k, v in figures.items() if k.startswith(FAULT)]
    said = "; ".join(f"{reason} ({count:.0f})" for count, reason in sorted(reasons)[:-4:-1])
    return (
        f"{faults:.0f} of {pairs:.0f} answers got no verdict (judge.max_fault_share={limit}): "
        f"the judge reported {said}. What was done is saved: see to the judge and start again"
    )
