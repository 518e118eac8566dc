"""Linear log-prob against log_softmax in float64, and what it must not keep or compute."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from speciarl.kernels.head import default_chunk, linear_logprob


def oracle(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: list[int]
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by materialised logits, in the dtype given."""
    logits = hidden @ weight.T / temperature
    mask = torch.zeros(weight.shape[0], dtype=torch.bool)
    mask[banned] = True
    logp = logits.masked_fill(mask, -torch.inf).log_softmax(-1)
    plogp = logp.exp() * logp.masked_fill(mask, 0.0)
    return logp.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1), -plogp.sum(-1)


def draw(
    rows: int, vocab: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=rng, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=rng)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("banned", [None, torch.tensor([2, 6])])
def test_gradcheck(banned: Tensor | None, with_entropy: bool) -> None:
    hidden, weight, targets = draw(5, 7, 3)
    targets.copy_(torch.tensor([0, 1, 3, 4, 5]))

    def call(h: Tensor, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return linear_logprob(
            h, w, targets, temperature=0.7, banned=banned, return_entropy=with_entropy, chunk=2
        )

    assert torch.autograd.gradcheck(call, (hidden, weight))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_equals_log_softmax(data: Any) -> None:
    rows = data.draw(st.integers(0, 9), "rows")
    vocab = data.draw(st.integers(1, 40), "vocab")
    width = data.draw(st.integers(1, 8), "width")
    banned = data.draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=vocab - 1))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 2.5]))
    chunk = data.draw(st.one_of(st.none(), st.integers(1, 10)))
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
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype  # rounded once, at the end
        error = (grad.double() - reference).norm() / reference.norm()
        assert error < (2e-6 if dtype == torch.float32 else 2.5e-3)


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


def test_banned_target_is_impossible_and_its_column_has_no_gradient() -> None:
    hidden, weight, targets = draw(2, 6, 3)
    targets.copy_(torch.tensor([4, 1]))
    logp = linear_logprob(hidden, weight, targets, banned=torch.tensor([4]))
    assert logp[0] == -torch.inf and logp[1].isfinite()
    grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    expected = oracle(hidden, weight, targets, 1.0, [4])[0]
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (hidden, weight)))
    assert (grads[1][4] == 0).all()


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


class Record(TorchDispatchMode):
    """Names of the operators called, and the largest tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def keep_saved(saved: list[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Within it, every tensor that autograd saves for a backward pass joins the list."""

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def products(record: Record) -> int:
    return sum(name in ("mm", "addmm", "addmm_") for name in record.names)


def test_frozen_inputs_cost_no_product() -> None:
    hidden, weight, targets = draw(8, 30, 4)

    def backward(h: Tensor, w: Tensor) -> Record:
        logp = linear_logprob(h, w, targets, chunk=8)
        with Record() as record:
            logp.sum().backward()
        return record

    assert products(backward(hidden, weight)) == 3  # logits, dX, dW
    hidden.grad = weight.grad = None
    assert products(backward(hidden, weight.detach())) == 2
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    assert products(backward(hidden.detach(), weight)) == 2
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


def test_default_chunk_follows_the_vocabulary() -> None:
    for vocab in (1, 400, 32768, 152064):
        weight = torch.empty(vocab, 2, device="meta")
        rows = default_chunk(torch.empty(1, 2), weight)
        assert rows >= 16 and (rows == 16 or rows * vocab * 4 <= 1 << 25)


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
