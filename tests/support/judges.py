"""Judges made of a function, which keep what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock

from speciarl.judge.base import Pair, Verdict
from speciarl.judge.tally import Tally

Answer = Callable[[Pair], int | None]


class FakeJudge:
    """Says what `answer` says; None is a fault called "broken".

    asked: every pair, in order. events: "wake", "sleep", "close" and the sizes of batches.
    """

    def __init__(
        self, answer: Answer, identity: str = "fake-v1", *, concurrent: bool = True
    ) -> None:
        self.answer = answer
        self.identity = identity
        self.concurrent = concurrent
        self.asked: list[Pair] = []
        self.events: list[str] = []
        self.counts = Tally()
        self.lock = Lock()

    def check(self, truths: Iterable[str]) -> None:
        self.events.append("check")

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        with self.lock:
            self.asked += pairs
            self.events.append(f"grade {len(pairs)}")
        self.counts.add("model_calls", len(pairs))
        return [self.verdict(self.answer(pair)) for pair in pairs]

    @staticmethod
    def verdict(category: int | None) -> Verdict:
        return Verdict(category, "broken" if category is None else "model")

    def tally(self) -> dict[str, float]:
        return self.counts.snapshot()

    def sleep(self) -> None:
        self.events.append("sleep")

    def wake(self) -> None:
        self.events.append("wake")

    def close(self) -> None:
        self.events.append("close")


class StreamingJudge(FakeJudge):
    """Yields its verdicts one by one, the last pair first."""

    def grade_each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        for index in reversed(range(len(pairs))):
            self.asked.append(pairs[index])
            yield index, self.verdict(self.answer(pairs[index]))
