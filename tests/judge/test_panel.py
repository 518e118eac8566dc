"""Votes of several judges."""

from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement, permutations

import pytest

from judges import FakeJudge
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.panel import PanelJudge, winner
from speciarl.kernels.codes import S_MINUS, S_PLUS, A, G, S, W

PAIR = Pair("robin", "bird")


def members(*answers: int | None, concurrent: bool = True) -> list[FakeJudge]:
    def saying(answer: int | None, number: int) -> FakeJudge:
        return FakeJudge(lambda pair: answer, f"m{number}", concurrent=concurrent)

    return [saying(answer, number) for number, answer in enumerate(answers)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_votes_by_their_definition(size: int) -> None:
    for votes in combinations_with_replacement(range(W, S_PLUS + 1), size):
        most = max(Counter(votes).values())
        often = [category for category in votes if votes.count(category) == most]
        middle = [
            category
            for category in votes
            if 2 * sum(v < category for v in votes) <= size
            and 2 * sum(v > category for v in votes) <= size
        ]
        for order in set(permutations(votes)) if size < 4 else {votes, votes[::-1]}:
            assert winner(order, "majority") == min(often)
            assert winner(order, "median") == min(middle)


@pytest.mark.parametrize(
    ("answers", "majority", "median", "agreement"),
    [
        ((S, S, W), S, S, Fraction(2, 3)),
        ((S, W, G), W, G, Fraction(1, 3)),
        ((S_PLUS, S_PLUS, W, W), W, W, Fraction(1, 2)),
        ((S, A), A, A, Fraction(1, 2)),
        ((S, None, S), S, S, 1),
        ((S, None, W), W, W, Fraction(1, 2)),
        ((S_MINUS, None), S_MINUS, S_MINUS, 1),
    ],
)
def test_ties_go_to_the_lower_category_and_faults_have_no_vote(
    answers: tuple[int | None, ...], majority: int, median: int, agreement: float
) -> None:
    for vote, expected in (("majority", majority), ("median", median)):
        panel = PanelJudge(members(*answers), vote)
        (verdict,) = panel.grade([PAIR])
        assert verdict.category == expected and verdict.margin is None
        votes = [answer for answer in answers if answer is not None]
        shares = tuple(votes.count(code) / len(votes) for code in range(6))
        assert verdict.probabilities == shares and verdict.source == "model"
        assert panel.tally()["votes"] == 1 and "faults" not in panel.tally()
        if vote == "majority":
            assert panel.tally()["agreement"] == pytest.approx(float(agreement))


@pytest.mark.parametrize("answers", [(None, None), (S, None, None), (S, S, None, None, None)])
def test_too_few_votes_are_a_fault(answers: tuple[int | None, ...]) -> None:
    panel = PanelJudge(members(*answers), "majority")
    assert panel.grade([PAIR, PAIR]) == [Verdict(None, "broken")] * 2
    assert panel.tally()["faults"] == 2 and "votes" not in panel.tally()


def test_counters_add_up_and_every_member_is_asked() -> None:
    asked = members(S, S, W)
    panel = PanelJudge(asked, "median")
    panel.check(["robin"])
    panel.wake()
    assert len(panel.grade([PAIR] * 4)) == 4
    panel.close()
    assert panel.concurrent and panel.tally() == {
        "model_calls": 12,
        "pairs": 4,
        "votes": 4,
        "agreement": pytest.approx(8 / 3),
    }
    assert [m.events for m in asked] == [["check", "wake", "grade 4", "close"]] * 3
    assert panel.identity == "median(m0; m1; m2)"


def test_members_on_the_engines_device_take_turns() -> None:
    order: list[str] = []
    local = members(S, W, concurrent=False)
    for member in local:
        member.events = order
    panel = PanelJudge([*local, *members(W)], "majority")
    assert not panel.concurrent
    panel.wake()
    assert panel.grade([PAIR])[0].category == W
    panel.sleep()
    assert order == ["wake", "grade 1", "sleep"] * 2 + ["sleep"] * 2


@pytest.mark.parametrize("given", [(1, "majority"), (2, "mean")])
def test_impossible_panels(given: tuple[int, str]) -> None:
    with pytest.raises(ValueError, match=f"a panel of {given[0]} with vote '{given[1]}'"):
        PanelJudge(members(*[S] * given[0]), given[1])
