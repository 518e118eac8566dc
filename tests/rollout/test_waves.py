import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speciarl.rollout.engine import Prompt, Request, Rollout
from speciarl.rollout.prefill import chunks
from speciarl.rollout.waves import Assembly, Row, distinct_prompts, plan_waves


def prompt(key: str, length: int = 3) -> Prompt:
    ids = torch.arange(length)
    return Prompt(key, ids, ids.expand(3, -1), {}, truth="")


def request(key: str, samples: int, group: str | None = None) -> Request:
    return Request(prompt(key), key if group is None else group, tuple(range(samples)))


def finished(requests: list[Request], row: Row) -> tuple[Row, Rollout]:
    wanted = requests[row.request]
    return row, Rollout(wanted.prompt, wanted.group_key, row.sample_id, [1], [0.0], "stop", 0)


@given(st.lists(st.integers(1, 12), max_size=12), st.integers(1, 9))
def test_waves_hold_every_row_once(samples: list[int], max_rows: int) -> None:
    requests = [request(str(i), n) for i, n in enumerate(samples)]
    waves = plan_waves(requests, max_rows)
    rows = [row for wave in waves for row in wave]
    assert rows == [Row(i, s) for i, n in enumerate(samples) for s in range(n)]
    assert all(0 < len(wave) <= max_rows for wave in waves)
    for index, n in enumerate(samples):
        where = {i for i, wave in enumerate(waves) if any(row.request == index for row in wave)}
        assert len(where) == 1 or n > max_rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_chunks_cover_all_prompts_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = list(chunks(lengths, budget))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts:
        size = len(lengths[part])
        assert size == 1 or size * max(lengths[part]) <= budget


def test_a_group_comes_with_its_last_rollout_in_the_order_of_its_requests() -> None:
    # "pair" spans two prompts, and its second request is finished first.
    requests = [request("a", 2, "pair"), request("b", 1), request("c", 2, "pair")]
    assembly = Assembly(requests)
    given_up = [Row(2, 1), Row(1, 0), Row(0, 1), Row(2, 0), Row(0, 0)]
    groups = [list(assembly.add([finished(requests, row)])) for row in given_up]
    assert [[group.group_key for group in step] for step in groups] == [[], ["b"], [], [], ["pair"]]
    pair = groups[-1][0].rollouts
    assert [(r.prompt.key, r.sample_id) for r in pair] == [("a", 0), ("a", 1), ("c", 0), ("c", 1)]


def test_a_group_does_without_what_cannot_be_used() -> None:
    requests = [request("a", 3), request("b", 1)]
    assembly = Assembly(requests)
    assert list(assembly.add([(Row(0, 0), None), finished(requests, Row(0, 1))])) == []
    (first,) = assembly.add([(Row(0, 2), None)])
    (second,) = assembly.add([(Row(1, 0), None)])
    assert (first.group_key, [r.sample_id for r in first.rollouts]) == ("a", [1])
    assert (second.group_key, second.rollouts) == ("b", [])


def test_distinct_prompts_are_by_identity_and_sorted() -> None:
    long, short = prompt("x", 9), prompt("x", 2)
    requests = [Request(p, str(i), (0,)) for i, p in enumerate((long, short, long))]
    assert [p is q for p, q in zip(distinct_prompts(requests), (short, long), strict=True)]
    assert len(distinct_prompts(requests)) == 2


def test_malformed_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="'g'.*distinct"):
        Request(prompt("a"), "g", ())
    with pytest.raises(ValueError, match="'g'.*distinct"):
        Request(prompt("a"), "g", (1, 1))
    ids = torch.arange(4)
    with pytest.raises(ValueError, match=r"'k'.*positions must be \[3, 4\]"):
        Prompt("k", ids, ids[None], {}, "")
    with pytest.raises(ValueError, match="'k'.*input_ids"):
        Prompt("k", ids[:0], ids[:0].expand(3, -1), {}, "")
