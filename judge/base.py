"""What every judge speaks: pairs in, verdicts out. A judge is chosen by name (registry.py)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from speciarl.kernels.codes import S_PLUS, W


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
    source: what decided, for counting ("name", "abstain", "unknown", ...).
    margin: log-probability of the label over the runner-up in nats; None where nothing is sampled.
    Raises ValueError for a category outside the ladder.
    """

    category: int | None
    source: str
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.category is not None and not W <= self.category <= S_PLUS:
            raise ValueError(
                f"category must be None or a code from {W} (wrong) to {S_PLUS} (more specific), "
                f"not {self.category}"
            )


@runtime_checkable
class Judge(Protocol):
    """Grades pairs. `grade` may be called from several threads at once.

    `identity` names the judge and everything its verdicts depend on, so that it can key a cache
    and stand in the record of a run: two judges of one identity give the same verdicts.
    """

    identity: str

    def check(self, truths: Iterable[str]) -> None:
        """Raise ValueError naming the labels that could never be judged; asked before a run."""
        ...

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order. A pair that cannot be judged gets category None."""
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
