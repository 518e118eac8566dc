"""Every invariant that core/plan.py states, on any costs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speciarl.core.plan import MicroBatch, assign, fill, plan

any_costs = st.lists(st.integers(1, 500), max_size=60)
any_ranks = st.integers(1, 9)
any_budget = st.integers(1, 1500)


def total(costs: list[int], micro: list[MicroBatch]) -> int:
    return sum(costs[i] for part in micro for i in part)


@settings(deadline=None)
@given(any_costs, any_ranks, any_budget)
def test_every_sequence_once_and_in_order(costs: list[int], ranks: int, budget: int) -> None:
    planned = plan(costs, ranks, budget)
    assert len(planned) == ranks
    assert [i for micro in planned for part in micro for i in part] == list(range(len(costs)))


@settings(deadline=None)
@given(any_costs, any_ranks, any_budget)
def test_ranks_have_equally_many_micro_batches(costs: list[int], ranks: int, budget: int) -> None:
    planned = plan(costs, ranks, budget)
    assert len({len(micro) for micro in planned}) == 1
    # Not more than the busiest rank needs, and what is empty comes last.
    assert not planned[0] or any(micro[-1] for micro in planned)
    for micro in planned:
        filled = [bool(part) for part in micro]
        assert filled == sorted(filled, reverse=True)


@settings(deadline=None)
@given(any_costs, any_ranks, any_budget)
def test_a_micro_batch_keeps_the_budget_or_holds_one_oversize_sequence(
    costs: list[int], ranks: int, budget: int
) -> None:
    for micro in plan(costs, ranks, budget):
        for part in micro:
            cost = sum(costs[i] for i in part)
            assert cost <= budget or len(part) == 1


@settings(deadline=None)
@given(any_costs, any_ranks, any_budget)
def test_no_two_neighbours_would_fit_into_one(costs: list[int], ranks: int, budget: int) -> None:
    for micro in plan(costs, ranks, budget):
        for part, following in zip(micro, micro[1:], strict=False):
            if following:
                assert sum(costs[i] for i in part) + costs[following[0]] > budget


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), any_ranks)
def test_the_heaviest_rank_is_bounded(costs: list[int], ranks: int) -> None:
    loads = [total(costs, micro) for micro in plan(costs, ranks, budget=700)]
    mean = sum(costs) / ranks
    assert max(loads) <= mean + max(costs)
    if max(costs) <= 0.05 * mean:
        assert max(loads) <= 1.1 * mean


@settings(deadline=None)
@given(st.integers(1, 8), st.data())
def test_short_sequences_are_balanced_to_ten_percent(ranks: int, data: st.DataObject) -> None:
    # At least 40 of at most 2 units a rank: none costs more than 5 % of a rank's share.
    costs = data.draw(st.lists(st.integers(1, 2), min_size=40 * ranks, max_size=60 * ranks))
    mean = sum(costs) / ranks
    assert max(costs) <= 0.05 * mean
    loads = [sum(costs[i] for i in run) for run in assign(costs, ranks)]
    assert max(loads) <= 1.1 * mean


def test_an_example_by_hand() -> None:
    # Shares of 10: midpoints 2, 5.5, 9 | 12, 16, 19. The 7 is over the budget of 6.
    assert plan([4, 3, 4, 2, 6, 1], ranks=2, budget=7) == [[(0, 1), (2,)], [(3,), (4, 5)]]
    apart = [(0, 0), (1, 0), (2, 0)]
    assert fill([0, 1, 2], [2, 7, 2], 6, apart) == [(0,), (1,), (2,)]
    assert plan([5], ranks=3, budget=9) == [[()], [(0,)], [()]]
    assert plan([], ranks=2, budget=9) == [[], []]


groups = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(0, 200), min_size=1, max_size=8)),
    min_size=1,
    max_size=12,
)


def computed(costs: list[int], prompts: list[tuple[int, int]], part: MicroBatch) -> int:
    """Tokens of a micro-batch: own tokens, and each prompt once."""
    return sum(costs[i] for i in part) + sum(dict(prompts[i] for i in part).values())


@settings(deadline=None)
@given(groups, any_ranks, any_budget)
def test_a_shared_prompt_costs_once_in_a_micro_batch(
    drawn: list[tuple[int, list[int]]], ranks: int, budget: int
) -> None:
    costs = [own for _, owns in drawn for own in owns]
    prompts = [(g, prompt) for g, (prompt, owns) in enumerate(drawn) for _ in owns]
    planned = plan(costs, ranks, budget, prompts)
    parts = [part for micro in planned for part in micro]
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len({len(micro) for micro in planned}) == 1
    for part in parts:
        assert computed(costs, prompts, part) <= budget or len(part) == 1
    # A rank's share of the work, each prompt's cost spread over its samples, and one prompt more
    # where a group is cut: at most the mean and the longest single sequence with its prompt.
    sizes = [len(drawn[g][1]) for g, _ in prompts]
    spread = [c + n / size for c, (_, n), size in zip(costs, prompts, sizes, strict=True)]
    mean = sum(spread) / ranks
    for micro in planned:
        assert sum(spread[i] for part in micro for i in part) <= mean + max(spread) + 1e-6


def test_sharing_saves_the_prompt() -> None:
    prompts = [(0, 10)] * 4 + [(1, 10)] * 4
    assert plan([1] * 8, 1, 28, prompts) == [[tuple(range(8))]]
    assert plan([11] * 8, 1, 28) == [[(0, 1), (2, 3), (4, 5), (6, 7)]]
    assert plan([1] * 8, 1, 12, prompts) == [[(0, 1), (2, 3), (4, 5), (6, 7)]]


@pytest.mark.parametrize(
    ("costs", "ranks", "budget"), [([3, 0], 1, 5), ([3, -1], 1, 5), ([3], 0, 5), ([3], 1, 0)]
)
def test_impossible_input_is_refused(costs: list[int], ranks: int, budget: int) -> None:
    with pytest.raises(ValueError, match=f"positive.*ranks={ranks}.*budget={budget}"):
        plan(costs, ranks, budget)
