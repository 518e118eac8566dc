import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from speciarl.rollout.engine import Sampling
from speciarl.rollout.sampling import choose, inverse_cdf, truncate

NONE = torch.empty(0, dtype=torch.long)


def logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def even(count: int) -> Tensor:
    """The middles of `count` equal parts of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=2.0, top_k=12, top_p=0.6),
    ],
)
def test_frequencies_are_the_softmax(sampling: Sampling) -> None:
    banned, count = torch.tensor([3, 29]), 20_000
    row = logits(1, 30)
    ids, logprobs = choose(row.expand(count, -1), sampling, even(count), banned)

    masked = row.double().index_fill(1, banned, -torch.inf) / sampling.temperature
    whole = masked.log_softmax(-1)[0]
    kept = masked
    if sampling.top_k:
        kept = TopKLogitsWarper(sampling.top_k)(None, kept)
    if sampling.top_p < 1:
        kept = TopPLogitsWarper(sampling.top_p)(None, kept)
    expected = kept.softmax(-1)[0] * count
    found = torch.bincount(ids, minlength=30)
    # Evenly spread numbers hit an interval of length p just p * count times, give or take one.
    assert (found - expected).abs().max() <= 1.01
    assert not found[banned].any()
    torch.testing.assert_close(logprobs.double(), whole[ids], atol=2e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [1, 7, 500])
def test_inverse_cdf_against_a_loop(vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((40, vocabulary)) * (rng.random((40, vocabulary)) < 0.3)
    weights[:, rng.integers(vocabulary)] += 0.1
    last = 1 - 2.0**-53
    uniforms = np.concatenate([[0.0, last] * 5, rng.random(30)])
    found = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(uniforms))
    for row, u, index in zip(weights, uniforms, found[:, 0].tolist(), strict=True):
        reached = np.cumsum(row)
        assert index == next(i for i, s in enumerate(reached) if s > u * reached[-1])
        assert row[index] > 0


def test_the_largest_number_never_reaches_a_banned_tail() -> None:
    rows = logits(200, 60)
    uniforms = torch.full((200,), 1 - 2.0**-53, dtype=torch.float64)
    ids, _ = choose(rows, Sampling(), uniforms, torch.arange(50, 60))
    assert int(ids.max()) < 50


def test_greedy_takes_the_best_allowed_at_temperature_one() -> None:
    rows = logits(50, 20)
    banned = rows.argmax(-1).unique()[:3]
    ids, logprobs = choose(rows, Sampling(temperature=0), torch.zeros(50).double(), banned)
    masked = rows.index_fill(1, banned, -torch.inf)
    assert torch.equal(ids, masked.argmax(-1))
    assert torch.equal(logprobs, masked.log_softmax(-1).max(-1).values)


def test_ties_at_the_cut_stay() -> None:
    weights = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.1]]).double()
    assert truncate(weights, Sampling(top_k=1)).ne(0).tolist() == [
        [False, True, True, False, False]
    ]
    assert truncate(weights, Sampling(top_p=0.2)).ne(0).sum() == 2
    assert truncate(weights, Sampling(top_p=0.61)).ne(0).sum() == 3
    assert truncate(weights, Sampling(top_p=0.81)).ne(0).all()


def test_low_precision_logits_are_sampled_in_high_precision() -> None:
    rows = logits(100, 40).bfloat16()
    ids, logprobs = choose(rows, Sampling(), even(100), NONE)
    assert logprobs.dtype == torch.float32
    expected = rows.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)


def test_rows_do_not_touch_each_other_or_the_input() -> None:
    rows = logits(30, 25)
    before, banned, uniforms = rows.clone(), torch.tensor([1]), even(30)
    together = choose(rows, Sampling(top_p=0.9), uniforms, banned)
    assert torch.equal(rows, before)
    for i in range(30):
        alone = choose(rows[i : i + 1], Sampling(top_p=0.9), uniforms[i : i + 1], banned)
        assert alone[0] == together[0][i] and alone[1] == together[1][i]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_p=0.7)])
def test_samples_may_share_a_row(sampling: Sampling) -> None:
    table, rows, banned = logits(5, 40), torch.tensor([4, 0, 0, 2, 4, 4]), torch.tensor([7])
    shared = choose(table, sampling, even(6), banned, rows)
    apart = choose(table[rows], sampling, even(6), banned)
    assert torch.equal(shared[0], apart[0]) and torch.equal(shared[1], apart[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show(bad: float) -> None:
    rows = logits(2, 10)
    rows[1, 4] = bad
    for sampling in (Sampling(), Sampling(temperature=0)):
        _, logprobs = choose(rows, sampling, even(2), NONE)
        assert logprobs.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_impossible_values_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"sampling.{name} = {value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]
