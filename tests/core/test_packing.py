"""Who sees whom in a packed row: every route's index tensors against a plain mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speciarl.core.attention import ROUTES, _gathered, choose_route, packed_attention
from speciarl.core.packing import Packing, packing

CPU = torch.device("cpu")
trees = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=5
)


def visible(row: list[tuple[int, list[int]]]) -> Tensor:
    """bool [T, T] from the definition: the prompt so far, then the own completion so far."""
    tree, branch, place = [], [], []
    for number, (prompt, completions) in enumerate(row):
        for index, length in enumerate([prompt, *completions]):
            tree += [number] * length
            branch += [index] * length
            place += range(length) if index == 0 else range(prompt, prompt + length)
    t, b, p = torch.tensor(tree), torch.tensor(branch), torch.tensor(place)
    same_tree = t[:, None] == t
    own_or_prompt = (b[:, None] == b) | (b == 0)
    return same_tree & own_or_prompt & (p[:, None] >= p)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[1, Hq, T, D] attention with grouped heads, by the formula."""
    share = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(share, 1) for x in (k, v))
    scores = 0.3 * q @ keys.transpose(2, 3)
    return F.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ values


def by_segments(q: Tensor, k: Tensor, v: Tensor, at: Packing) -> Tensor:
    """What a kernel for segments of variable length computes: causality at the end of the keys."""
    keys, values = _gathered(k[0].transpose(0, 1), v[0].transpose(0, 1), at)
    queries, out = q[0].transpose(0, 1), []
    for s in range(len(at.cu_q) - 1):
        (a, b), (c, d) = at.cu_q[s : s + 2].tolist(), at.cu_k[s : s + 2].tolist()
        assert b - a <= at.longest_q and d - c <= at.longest_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        one = [x[None].transpose(1, 2) for x in (queries[a:b], keys[c:d], values[c:d])]
        out.append(plain(*one, mask))
    return torch.cat(out, 2)


@settings(deadline=None, max_examples=40)
@given(trees, st.integers(0, 1000))
def test_every_route_sees_what_the_definition_says(
    row: list[tuple[int, list[int]]], seed: int
) -> None:
    mask = visible(row)
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, len(mask), 4) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, dtype=torch.float64, generator=draw).requires_grad_() for s in shapes)
    upstream = torch.randn(1, len(mask), 4, 4, dtype=torch.float64, generator=draw)
    wanted = plain(q, k, v, mask).transpose(1, 2)
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), (q, k, v))
    at = packing(row, CPU)
    found, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=0.3, packed=at)
    torch.testing.assert_close(found, wanted)
    found_grads = torch.autograd.grad((found * upstream).sum(), (q, k, v))
    torch.testing.assert_close(found_grads, wanted_grads)
    torch.testing.assert_close(by_segments(q, k, v, at).transpose(1, 2), wanted)


@pytest.mark.parametrize("row", [[(3, [])], [(3, [0, 0])], [(1, [0]), (2, [])]])
def test_prompts_alone_need_no_gathered_keys(row: list[tuple[int, list[int]]]) -> None:
    at = packing(row, CPU)
    assert at.keys is None and len(at.blocks) == 1
    assert at.cu_q.tolist() == at.cu_k.tolist()


def test_a_wrong_route_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_route("sdpa", CPU, torch.float32) == "sdpa"
    right = ROUTES["sdpa"]
    monkeypatch.setitem(ROUTES, "sdpa", lambda q, k, v, at, scale: right(q, k, v * 1.01, at, scale))
    with pytest.raises(RuntimeError, match="'sdpa' is wrong by.*model.attention=sdpa"):
        choose_route("sdpa", CPU, torch.float32)


def test_auto_takes_the_first_route_that_is_here_and_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems: dict[str, Exception] = {
        "flash-attn": ImportError("no flash_attn"),
        "varlen": TypeError("unexpected keyword 'window_size'"),
    }

    def check(route: str, device: torch.device, dtype: torch.dtype) -> None:
        if route in problems:
            raise problems[route]

    monkeypatch.setattr("speciarl.core.attention.check_route", check)
    gpu = torch.device("cuda")
    with pytest.warns(UserWarning, match="'varlen' is not used: unexpected keyword"):
        assert choose_route("auto", gpu, torch.bfloat16) == "sdpa"
    del problems["varlen"]
    assert choose_route("auto", gpu, torch.bfloat16) == "varlen"
    assert choose_route("auto", gpu, torch.float32) == "sdpa"
