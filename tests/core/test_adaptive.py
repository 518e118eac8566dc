"""Which groups are uncertain, and how a step's budget is shared among them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciarl.core.adaptive import Spent, top_up, uncertain
from speciarl.core.config import Config
from speciarl.core.settings import SettingsError, load
from speciarl.kernels.codes import ABSENT, CODES, FORMAT, S_MINUS, S_PLUS, A, G, S, W


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((ABSENT, ABSENT, ABSENT), True),  # nothing scored
        ((FORMAT, FORMAT, ABSENT), True),
        ((W, W, W), True),
        ((A, A, W), True),
        ((G, G, G), True),  # however many: better may come
        ((W, W, S), True),  # one alone reaches the bar
        ((FORMAT, S_MINUS, FORMAT), True),
        ((W, S_MINUS, S_MINUS), False),
        ((S_MINUS, S_MINUS, S), True),
        ((W, S, S_PLUS), False),  # the bar is S where the best is more specific
        ((S_MINUS, S_PLUS, ABSENT), True),
        ((S, S, S), False),
    ],
)
def test_when_a_bar_is_uncertain(row: tuple[int, ...], expected: bool) -> None:
    assert uncertain(np.array([row], dtype=np.int8)).tolist() == [expected]


def open_groups(count: int) -> np.ndarray:
    return np.full((count, 1), ABSENT, dtype=np.int8)


def test_shares_are_equal_and_what_is_left_goes_to_the_first() -> None:
    asked = np.array([4, 4, 8, 4])
    codes = np.array([[W, W], [S, S], [W, S], [W, G]], dtype=np.int8)
    assert top_up(codes, asked, 100, size=4, most=24).tolist() == [4, 0, 4, 4]
    assert top_up(codes, asked, 100, size=4, most=9).tolist() == [4, 0, 1, 4]
    assert top_up(codes, asked, 25, size=4, most=24).tolist() == [2, 0, 2, 1]
    assert top_up(codes, asked, 26, size=4, most=9).tolist() == [3, 0, 1, 2]
    assert top_up(codes, asked, 20, size=4, most=24).tolist() == [0] * 4


def test_n_at_once_is_a_single_round() -> None:
    first = top_up(open_groups(3), np.zeros(3, dtype=np.int64), 30, size=10, most=10)
    assert first.tolist() == [10, 10, 10]
    assert not top_up(open_groups(3), first, 30, size=10, most=10).any()


groups = st.integers(1, 9)


@given(st.data(), groups, st.integers(1, 5), st.integers(0, 6), st.integers(1, 12))
def test_a_step_holds_its_budget_and_spends_it_only_on_uncertain_groups(
    data: st.DataObject, count: int, start: int, above: int, more_at_most: int
) -> None:
    """Rounds as the trainer makes them, with verdicts and lost completions drawn at will."""
    n, most = start + above, start + above + more_at_most
    asked, budget = np.zeros(count, dtype=np.int64), n * count
    rows: list[list[int]] = [[] for _ in range(count)]
    for index in range(budget + 1):
        width = max([1, *map(len, rows)])
        codes = np.array([row + [ABSENT] * (width - len(row)) for row in rows], dtype=np.int8)
        more = top_up(codes, asked, budget, size=start, most=most)
        assert (more >= 0).all() and (more[~uncertain(codes)] == 0).all()
        assert (asked + more).sum() <= budget and (asked + more).max() <= most
        again = top_up(codes.copy(), asked.copy(), budget, size=start, most=most)
        assert (again == more).all()
        if index == 0:
            assert (more == start).all()
        open_ones = uncertain(codes) & (asked < most)
        given_to = more[open_ones & (most - asked >= start)]
        assert not len(given_to) or given_to.max() - given_to.min() <= 1
        if not more.any():
            # It ends only for a reason: nothing is open any more, or nothing is left.
            assert not open_ones.any() or asked.sum() == budget
            return
        asked += more
        for row, extra in zip(rows, more.tolist(), strict=True):
            came = data.draw(st.integers(0, extra))
            row += data.draw(st.lists(st.sampled_from(CODES), min_size=came, max_size=came))
    pytest.fail("more rounds than completions")


@given(st.permutations(range(6)), st.integers(0, 40))
def test_how_the_groups_are_numbered_changes_only_who_gets_the_rest(
    order: list[int], spare: int
) -> None:
    codes = np.array([[W, W], [S, S], [W, S], [G, W], [S, S], [A, W]], dtype=np.int8)
    asked = np.full(6, 4)
    one = top_up(codes, asked, 24 + spare, size=4, most=12)
    other = top_up(codes[order], asked, 24 + spare, size=4, most=12)
    assert one.sum() == other.sum() and np.abs(one[order] - other).max() <= 1


def test_what_was_spent_adds_up() -> None:
    first = Spent(prompts=4, empty=1, rounds=3, asked=30, budget=40, uncertain=2, lost=4)
    both = first + Spent(prompts=4, rounds=1, asked=10, budget=40, lost=1)
    assert both.scalars(adaptive=True) == {
        "groups/empty": 1,
        "completions/lost": 5,
        "adaptive/rounds": 4,
        "adaptive/uncertain": 0.25,
        "adaptive/budget_used": 0.5,
    }
    assert first.scalars(adaptive=False) == {"groups/empty": 1, "completions/lost": 4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("n_start=4",), "n_start=4, n=10, n_max=0"),
        (("n_max=12",), "n_start=0, n=10, n_max=12"),
        (("n_start=11", "n_max=12"), "n_start=11, n=10"),
        (("n_start=4", "n_max=9"), "n=10, n_max=9"),
        (("n_start=10", "n_max=10"), "n_start < n_max"),
        (("n_start=-1", "n_max=12"), "n_start=-1"),
        (("n_start=1", "n_max=12"), "rollout.n_start=1 with objective.normalize"),
    ],
)
def test_impossible_settings_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(Config, [], [f"rollout.{word}" for word in words])


def test_possible_settings() -> None:
    plain = ("rollout.n_start=1", "rollout.n_max=10", "objective.normalize=false")
    for words in (plain, ("rollout.n_start=10", "rollout.n_max=12")):
        assert load(Config, [], words).rollout.n == 10
