"""Each question once: equal pairs of a batch, and of batches under way at the same time."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from threading import Lock

from speciarl.judge.base import Judge, Pair, Verdict, Wrapper, each
from speciarl.judge.cache import storable

_QUOTES = ' ."\u201c\u201d'


def canonical(text: str) -> str:
    """The form in which a prediction is asked about: one for all that differ in nothing but case,
    blanks, line ends, and quotes or periods around the whole.

    The model is asked for this form, so a verdict depends on nothing but its key, whoever asked
    first. Accents, hyphens, separators and everything else that may matter stay.
    """
    return " ".join(storable(text).lower().split()).strip(_QUOTES)


class UniqueJudge(Wrapper):
    """Asks `inner` about each distinct pair once, whatever number of threads asks for it now.

    Nothing is remembered once a pair is answered: that is the cache's part. A fault is shared by
    those who wait for it; the next call asks again. "by_batch" counts the pairs answered with an
    equal one's verdict.
    """

    def __init__(self, inner: Judge) -> None:
        super().__init__(inner)
        self._lock = Lock()
        self._under_way: dict[Pair, Future[Verdict]] = {}

    def check(self, truths: Iterable[str]) -> None:
        """Raises ValueError for an empty truth, then asks the inner judge."""
        known = list(truths)
        if not all(truth.strip() for truth in known):
            raise ValueError("a label is empty: every image needs a ground truth to be judged by")
        super().check(known)

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order; an error of the inner judge reaches all who wait."""
        keys = [Pair(pair.truth, canonical(pair.prediction)) for pair in pairs]
        answers: dict[Pair, Future[Verdict]] = {}
        mine: dict[Pair, Future[Verdict]] = {}
        with self._lock:
            for key in keys:
                if key not in answers:
                    if key not in self._under_way:
                        self._under_way[key] = mine[key] = Future()
                    answers[key] = self._under_way[key]
        if mine:
            self._ask(mine)
        verdicts = [answers[key].result() for key in keys]
        self.counts.add("pairs", len(pairs))
        self.counts.add("by_batch", len(pairs) - len(mine))
        self.counts.add("faults", sum(verdict.category is None for verdict in verdicts))
        return verdicts

    def _ask(self, mine: dict[Pair, Future[Verdict]]) -> None:
        """Fills the futures, each as soon as its verdict is there."""
        order = list(mine)
        problem: BaseException = RuntimeError(f"judge {self.identity} left a pair without verdict")
        try:
            for index, verdict in each(self.inner, order):
                mine[order[index]].set_result(verdict)
                self._forget(order[index])
        except BaseException as error:
            problem = error
            raise
        finally:
            for key in order:
                if not mine[key].done():
                    mine[key].set_exception(problem)
                    self._forget(key)

    def _forget(self, key: Pair) -> None:
        with self._lock:
            del self._under_way[key]
