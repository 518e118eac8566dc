"""What every judge speaks: pairs in, verdicts out. A judge is chosen by name (registry.py)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from speciarl.judge.tally import Tally
from speciarl.kernels.codes import S_PLUS, W

RUNGS = S_PLUS - W + 1


@dataclass(frozen=True)
class Pair:
    """One question to a judge: is `prediction` a name of what `truth` names?

    `prediction` is the text between the answer tags; a completion without it never reaches a judge.
    """

    truth: str
    prediction: str


@dataclass(frozen=True)
class Verdict:
    """The place of a prediction on the ladder of SpeciaRL, section 3.

    category: a code from W to S_PLUS, or None for a judge fault: the pair is unscored, not wrong.
    source: what decided, for counting ("name", "abstain", "unknown", ...); of a fault, what went
        wrong ("timeout", ...), in words that may be shown.
    margin: log-probability of the label over the runner-up in nats; None where nothing is sampled.
    probabilities: of W, A, G, S-, S, S+, in this order; None where the judge has none.
    Raises ValueError for a category outside the ladder, or other than six probabilities.
    """

    category: int | None
    source: str
    margin: float | None = None
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.category is not None and not W <= self.category <= S_PLUS:
            raise ValueError(
                f"category must be None or a code from {W} (wrong) to {S_PLUS} (more specific), "
                f"not {self.category}"
            )
        if self.probabilities is not None and len(self.probabilities) != RUNGS:
            raise ValueError(f"{len(self.probabilities)} probabilities, must be {RUNGS}")


@runtime_checkable
class Judge(Protocol):
    """Grades pairs. `grade` may be called from several threads at once.

    `identity` names the judge and everything its verdicts depend on (back-end, model, version of
    the prompt), so that it can key a cache and stand in the record of a run: two judges of one
    identity give the same verdicts. It never holds a key or an address with credentials.
    `concurrent`: whether it may grade while the rollout engine generates. A judge that shares the
    engine's device may not: it is called once after generation, between `wake` and `sleep`.

    A judge may also have `grade_each(pairs)`, an iterator of (index, verdict) in the order in
    which verdicts are made, each index once; `each` takes it where it is there.
    """

    identity: str
    concurrent: bool

    def check(self, truths: Iterable[str]) -> None:
        """Raise, before a run, what would make it fail: labels that could never be judged
        (ValueError naming them), a server out of reach, a missing key."""
        ...

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order. A pair that cannot be judged gets category None."""
        ...

    def tally(self) -> dict[str, float]:
        """Counts since the judge was made; differences of two calls are those of the time between.

        "pairs": asked of it. "faults": those of them without a verdict. "by_rule", "by_batch",
        "by_cache": answered without the model, by a rule, by an equal pair of the same time, by
        the cache. "model_calls": questions to the model, of one pair each. "retries": those of
        them that repeat one. "queue_seconds": summed over these, from being asked to being sent.
        "votes", "agreement": pairs that a panel voted on, and the sum over them of the share of
        members that agree with the vote.
        A counter that a judge does not keep is left out. A wrapper's own counter takes the place
        of one of the same name inside.
        """
        ...

    def sleep(self) -> None:
        """Release device memory until `wake`; harmless when there is none, or when asleep."""
        ...

    def wake(self) -> None:
        """Be ready for `grade` again; harmless when awake."""
        ...

    def close(self) -> None:
        """Release everything; the judge is not used afterwards."""
        ...


class Wrapper:
    """What a judge around another judge passes on; `grade` is the wrapper's own.

    counts: the wrapper's counters, over those of `inner` (`Judge.tally`).
    """

    def __init__(self, inner: Judge) -> None:
        self.inner = inner
        self.identity = inner.identity
        self.concurrent = inner.concurrent
        self.counts = Tally()

    def check(self, truths: Iterable[str]) -> None:
        """Asks the inner judge."""
        self.inner.check(truths)

    def tally(self) -> dict[str, float]:
        """The inner judge's counters, and this wrapper's over them."""
        return {**self.inner.tally(), **self.counts.snapshot()}

    def sleep(self) -> None:
        """Passed on."""
        self.inner.sleep()

    def wake(self) -> None:
        """Passed on."""
        self.inner.wake()

    def close(self) -> None:
        """Passed on."""
        self.inner.close()


def each(judge: Judge, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
    """(index, verdict) of every pair as verdicts are made, or all at once from `grade`."""
    stream = getattr(judge, "grade_each", None)
    return stream(pairs) if stream is not None else iter(enumerate(judge.grade(pairs)))


def in_order(count: int, verdicts: Iterable[tuple[int, Verdict]]) -> list[Verdict]:
    """`count` verdicts in the order of their pairs: a `grade` made of a `grade_each`.

    Raises RuntimeError if an index is missing or there twice.
    """
    found: dict[int, Verdict] = {}
    total = 0
    for index, verdict in verdicts:
        found[index] = verdict
        total += 1
    if total != count or len(found) != count or not all(i in found for i in range(count)):
        raise RuntimeError(f"{total} verdicts for {count} pairs, {len(found)} of them distinct")
    return [found[index] for index in range(count)]
