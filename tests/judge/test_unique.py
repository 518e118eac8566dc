"""Each question once, whoever asks it at the same time."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from judges import FakeJudge, StreamingJudge
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.unique import UniqueJudge, canonical
from speciarl.kernels.codes import A, S, W

ROBIN, WREN, OWL = (Pair("bird", name) for name in ("robin", "wren", "owl"))


@pytest.mark.parametrize("kind", [FakeJudge, StreamingJudge])
def test_equal_pairs_of_a_batch_are_asked_once(kind: type[FakeJudge]) -> None:
    inner = kind(lambda pair: None if pair == OWL else len(pair.prediction) - 1)
    judge = UniqueJudge(inner)
    batch = [WREN, ROBIN, Pair("bird", '" Robin."'), OWL, WREN, Pair("Bird", "robin"), OWL]
    assert [verdict.category for verdict in judge.grade(batch)] == [3, 4, 4, None, 3, 4, None]
    assert sorted(inner.asked, key=repr) == [Pair("Bird", "robin"), OWL, ROBIN, WREN]
    tally = judge.tally()
    assert (tally["pairs"], tally["by_batch"], tally["faults"]) == (7, 3, 2)
    judge.grade([OWL])  # a fault is not remembered; nor is anything else
    assert inner.asked.count(OWL) == 2


def test_what_differs_in_more_than_dress_stays_different() -> None:
    texts = ["robin", "robins", "Robin/cardinal", "robin cardinal", "pâté", "pate", "a-10", "a 10"]
    assert len({canonical(text) for text in texts}) == len(texts)
    assert canonical(' "The\n Robin\t."') == "the robin"
    assert canonical("\ud800x").encode() == b"\\ud800x"


class Gate(FakeJudge):
    """Signals that it was asked about a pair, and answers when it may."""

    def __init__(self, answer: int | None = S) -> None:
        super().__init__(lambda pair: answer)
        self.entered = {pair: Event() for pair in (ROBIN, WREN)}
        self.open = {pair: Event() for pair in (ROBIN, WREN)}

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        for pair in pairs:
            self.entered[pair].set()
            assert self.open[pair].wait(20)
        return super().grade(pairs)


@pytest.mark.parametrize("answer", [S, None])
def test_two_threads_with_one_question_are_one_call(answer: int | None) -> None:
    inner = Gate(answer)
    judge = UniqueJudge(inner)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(judge.grade, [ROBIN])
        assert inner.entered[ROBIN].wait(20)
        second = pool.submit(judge.grade, [ROBIN, WREN])  # asks for the wren itself, not the robin
        assert inner.entered[WREN].wait(20)
        inner.open[WREN].set()
        inner.open[ROBIN].set()
        verdicts = first.result(20) + second.result(20)
    assert [verdict.category for verdict in verdicts] == [answer] * 3
    assert sorted(inner.asked, key=repr) == [ROBIN, WREN]
    assert judge.tally()["by_batch"] == 1
    judge.grade([ROBIN])
    assert len(inner.asked) == 3


def test_an_error_reaches_all_who_wait_and_is_not_remembered() -> None:
    class Breaking(Gate):
        def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
            super().grade(pairs)
            if ROBIN in pairs and len(self.asked) < 3:
                raise ConnectionError("no route")
            return [Verdict(A, "model") for _ in pairs]

    inner = Breaking()
    judge = UniqueJudge(inner)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(judge.grade, [ROBIN])
        assert inner.entered[ROBIN].wait(20)
        second = pool.submit(judge.grade, [WREN, ROBIN])
        assert inner.entered[WREN].wait(20)
        for gate in inner.open.values():
            gate.set()
        for waiting in (first, second):
            with pytest.raises(ConnectionError, match="no route"):
                waiting.result(20)
    assert judge.grade([ROBIN])[0].category == A


def test_a_judge_that_leaves_a_pair_out_is_found_out() -> None:
    class Short(StreamingJudge):
        def grade_each(self, pairs):  # type: ignore[no-untyped-def]
            yield 0, Verdict(S, "model")

    judge = UniqueJudge(Short(lambda pair: S))
    with pytest.raises(RuntimeError, match="fake-v1 left a pair without verdict"):
        judge.grade([ROBIN, WREN])


def test_no_pair_is_under_way_twice_with_many_threads() -> None:
    active: set[Pair] = set()
    twice: list[Pair] = []

    class Tracked(FakeJudge):
        def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
            with self.lock:
                twice.extend(active.intersection(pairs))
                active.update(pairs)
            verdicts = super().grade(pairs)
            with self.lock:
                active.difference_update(pairs)
            return verdicts

    judge = UniqueJudge(Tracked(lambda pair: int(pair.prediction) % 6))
    draw = random.Random(0)
    batches = [[Pair("x", str(draw.randrange(30))) for _ in range(12)] for _ in range(400)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(judge.grade, batches))
    assert not twice
    for batch, verdicts in zip(batches, results, strict=True):
        assert [v.category for v in verdicts] == [int(pair.prediction) % 6 for pair in batch]
    tally = judge.tally()
    assert tally["pairs"] == 4800 == tally["by_batch"] + tally["model_calls"]


def test_an_empty_truth_is_refused_beforehand() -> None:
    judge = UniqueJudge(FakeJudge(lambda pair: W))
    with pytest.raises(ValueError, match="a label is empty"):
        judge.check(["robin", " "])
    judge.check(["robin"])
