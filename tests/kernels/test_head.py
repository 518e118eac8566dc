"""Linear log-prob against log_softmax in float64, and what it must not keep or compute."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headcases import Record, draw, keep_saved, off, oracle
from speciarl.kernels import reference
from speciarl.kernels.head import VocabShard, linear_logprob


# gradcheck goes back several times, which a stored table with entropies refuses.
@pytest.mark.parametrize(
    ("with_entropy", "mode"), [(False, "store"), (False, "recompute"), (True, "recompute")]
)
@pytest.mark.parametrize("banned", [None, torch.tensor([2, 6])])
def test_gradcheck(banned: Tensor | None, with_entropy: bool, mode: str) -> None:
    hidden, weight, targets = draw(5, 7, 3)
    targets.copy_(torch.tensor([0, 1, 3, 4, 5]))

    def call(h: Tensor, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return linear_logprob(
            h,
            w,
            targets,
            temperature=0.7,
            banned=banned,
            return_entropy=with_entropy,
            chunk=2,
            mode=mode,
        )

    assert torch.autograd.gradcheck(call, (hidden, weight))


@settings(max_examples=60)
@given(st.data())
def test_equals_log_softmax(data: Any) -> None:
    rows = data.draw(st.integers(0, 9), "rows")
    vocab = data.draw(st.integers(1, 40), "vocab")
    width = data.draw(st.integers(1, 8), "width")
    banned = data.draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=vocab - 1))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 2.5]))
    chunk = data.draw(st.one_of(st.none(), st.integers(1, 10)))
    mode = data.draw(st.sampled_from(["auto", "store", "recompute"]))
    hidden, weight, targets = draw(rows, vocab, width, seed=rows * 1000 + vocab)
    allowed = torch.tensor([v for v in range(vocab) if v not in banned])
    targets = allowed[targets % len(allowed)]
    upstream = torch.randn(2, rows, generator=torch.Generator().manual_seed(1)).double()
    upstream[:, ::3] = 0.0

    expected = torch.stack(oracle(hidden, weight, targets, temperature, banned))
    expected_grads = torch.autograd.grad(expected, (hidden, weight), upstream)
    logp, entropy = linear_logprob(
        hidden,
        weight,
        targets.int(),
        temperature=temperature,
        banned=torch.tensor(banned, dtype=torch.int32),
        return_entropy=True,
        chunk=chunk,
        mode=mode,
    )
    grads = torch.autograd.grad((logp, entropy), (hidden, weight), tuple(upstream))
    torch.testing.assert_close(torch.stack((logp, entropy)), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("only", ["logp", "entropy"])
def test_one_output_alone_carries_the_gradient(only: str) -> None:
    hidden, weight, targets = draw(6, 11, 4)
    index = 0 if only == "logp" else 1
    picked = linear_logprob(hidden, weight, targets, return_entropy=True, chunk=4)[index]
    expected = oracle(hidden, weight, targets, 1.0, [])[index]
    torch.testing.assert_close(
        torch.autograd.grad(picked.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_sums_are_fp32(dtype: torch.dtype) -> None:
    hidden, weight, targets = draw(130, 517, 64, dtype=dtype)
    hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    upstream = torch.randn(130, generator=torch.Generator().manual_seed(2))
    expected, expected_entropy = oracle(hidden64, weight64, targets, 1.0, [])
    expected_grads = torch.autograd.grad(expected, (hidden64, weight64), upstream.double())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, chunk=37)
        grads = torch.autograd.grad(logp, (hidden, weight), upstream)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=2e-5)
    for grad, right in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype  # rounded once, at the end
        assert off(grad, right) < (2e-6 if dtype == torch.float32 else 2.5e-3)


def test_chunks_do_not_change_the_result() -> None:
    hidden, weight, targets = draw(50, 33, 8)
    upstream = torch.linspace(-1, 1, 50, dtype=torch.float64)

    def run(chunk: int | None) -> tuple[Tensor, ...]:
        logp = linear_logprob(hidden, weight, targets, chunk=chunk)
        return (logp, *torch.autograd.grad(logp, (hidden, weight), upstream))

    whole = run(None)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(None), strict=True))
    for chunk in (1, 7, 50, 64):
        torch.testing.assert_close(run(chunk), whole, rtol=1e-12, atol=1e-13)


def test_extreme_logits() -> None:
    # Row 0: all logits near -1e4. Row 1: one-hot, target certain. Row 2: target nearly impossible.
    weight = torch.eye(5).requires_grad_()
    hidden = torch.zeros(3, 5)
    hidden[0] = torch.tensor([-1e4, -1e4 - 1, -1e4 - 2, -1e4 - 3, -1e4 - 4])
    hidden[1, 4] = 200.0
    hidden[2, 0] = 9e3
    hidden.requires_grad_()
    targets = torch.tensor([4, 4, 3])  # the last column too
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    expected = oracle(hidden.double(), weight.double(), targets, 1.0, [])
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-6)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_three_dimensional_hidden_states_and_strides() -> None:
    hidden, weight, targets = draw(12, 9, 4)
    shaped = hidden.reshape(3, 4, 4).transpose(0, 1)  # not contiguous
    ids = targets.reshape(3, 4).T
    logp = linear_logprob(shaped, weight.T.contiguous().T, ids, chunk=5)
    assert logp.shape == (4, 3) and not logp._is_view()  # FSDP warns of views
    expected = oracle(hidden, weight, targets, 1.0, [])[0]
    torch.testing.assert_close(logp.T.reshape(-1), expected)
    torch.testing.assert_close(
        torch.autograd.grad(logp.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
    )


def test_no_rows() -> None:
    hidden, weight, targets = draw(0, 9, 4, dtype=torch.float32)
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert weight.grad is not None and not weight.grad.any()


def test_frozen_inputs_cost_no_product() -> None:
    hidden, weight, targets = draw(8, 30, 4)

    def backward(h: Tensor, w: Tensor) -> Record:
        logp = linear_logprob(h, w, targets, chunk=8)
        with Record() as record:
            logp.sum().backward()
        return record

    assert backward(hidden, weight).products == 2  # dX, dW
    hidden.grad = weight.grad = None
    assert backward(hidden, weight.detach()).products == 1
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    assert backward(hidden.detach(), weight).products == 1
    assert hidden.grad is None and weight.grad is not None


@pytest.mark.parametrize("with_entropy", [False, True])
def test_memory_does_not_grow_with_rows_times_vocabulary(with_entropy: bool) -> None:
    rows, vocab, chunk = 256, 300, 16
    hidden, weight, targets = draw(rows, vocab, 8, dtype=torch.float32)
    saved: list[Tensor] = []
    with Record() as record:
        with keep_saved(saved):
            out = linear_logprob(hidden, weight, targets, return_entropy=with_entropy, chunk=chunk)
        torch.stack(out if isinstance(out, tuple) else (out,)).sum().backward()
    assert saved and max(t.numel() for t in saved) == weight.numel() < rows * vocab
    assert record.largest <= max(chunk * vocab, weight.numel(), hidden.numel())


def test_nothing_is_saved_without_gradients() -> None:
    hidden, weight, targets = draw(8, 30, 4)
    saved: list[Tensor] = []
    with keep_saved(saved):
        with torch.no_grad():
            logp = linear_logprob(hidden, weight, targets)
        detached = linear_logprob(hidden.detach(), weight.detach(), targets)
    assert not saved and not logp.requires_grad and not detached.requires_grad


def test_no_value_is_read_on_the_host() -> None:
    # A meta tensor has no values: reading one raises.
    hidden, weight, targets = (t.detach().to("meta") for t in draw(8, 30, 4))
    hidden.requires_grad_()
    banned = torch.empty(2, dtype=torch.int64, device="meta")
    logp, entropy = linear_logprob(hidden, weight, targets, banned=banned, return_entropy=True)
    (logp + entropy).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_store_keeps_one_table_and_multiplies_it_once() -> None:
    hidden, weight, targets = draw(40, 30, 4, dtype=torch.float32)
    saved: list[Tensor] = []
    with keep_saved(saved):
        logp = linear_logprob(hidden, weight, targets, chunk=8, mode="store")
    assert [t.shape for t in saved if t.numel() == 40 * 30] == [(40, 30)]
    with Record() as record:
        logp.sum().backward()
    assert record.products == 2  # dX, dW; nothing is computed again


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_a_second_backward_pass_is_right_or_refused(mode: str) -> None:
    hidden, weight, targets = draw(6, 11, 4)
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, mode=mode)
    first, again = (
        torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.autograd.grad(entropy.sum(), hidden, retain_graph=True)
    if mode == "store":  # the table has become the entropy's gradient
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(logp.sum(), hidden)


def test_a_row_of_the_formulas_by_hand() -> None:
    z = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    table = z.clone()
    sums = reference.settle(reference.row_sums(table, torch.tensor([2]), True))
    logp, entropy = reference.finish(sums)
    p = z.softmax(1)[0]
    torch.testing.assert_close(logp[0], p[2].log())
    torch.testing.assert_close(entropy[0], -(p * p.log()).sum())
    reference.put(table, torch.tensor([2]), reference.at_target(sums))
    one = torch.ones(1, dtype=torch.float64)
    factor = reference.gradient(table, torch.tensor([2]), sums, 0.5, one, None)
    expected = (torch.tensor([0.0, 0.0, 1.0]) - p) / 0.5
    torch.testing.assert_close(factor * table[0], expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": torch.zeros(4, 3)}, r"hidden \[4, 3\]"),
        ({"weight": torch.zeros(7)}, "weight"),
        ({"weight": torch.zeros(0, 2)}, "at least one row"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(4)}, "integer"),
        ({"hidden": torch.zeros(4, 2, dtype=torch.int64)}, "floating"),
        ({"banned": torch.zeros(1)}, "banned"),
        ({"banned": torch.zeros(1, 1, dtype=torch.int64)}, "banned"),
        ({"banned": torch.zeros(1, dtype=torch.int64, device="meta")}, "meta"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"route": "tritn"}, "route"),
        ({"mode": "keep"}, "mode = 'keep'.*store, recompute"),
        ({"route": "rows", "hidden": torch.zeros(4, 2).double()}, "'rows' cannot run.*float64"),
        ({"route": "expsum"}, "'expsum' cannot run.*float32"),
        ({"targets": torch.tensor([0, 1, 7, 2])}, r"targets holds 7; .*\[0, 7\)"),
        ({"targets": torch.tensor([0, -1, 6, 2])}, "targets holds -1"),
        ({"targets": torch.tensor([0, 5, 5, 2]), "banned": torch.tensor([5])}, "holds 5.*banned"),
        ({"banned": torch.tensor([3, 9])}, "banned holds 9"),
        ({"shard": VocabShard(3, 9)}, "ids 3 to 9 .*total = 9"),
        ({"shard": VocabShard(0, 9)}, "init_process_group"),
    ],
)
def test_bad_arguments_are_named(changes: dict, named: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 2),
        "weight": torch.zeros(7, 2),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=named):
        linear_logprob(**(arguments | changes))
