"""Every route of the linear log-prob against float64: accuracy, traps, faults.

Triton routes run under the interpreter.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headcases import ROUTES, draw, in_double, off, oracle
from speciarl.kernels import faults
from speciarl.kernels.head import linear_logprob

pytest.importorskip("triton")

MODES = ("store", "recompute")
every_route = pytest.mark.parametrize(("route", "dtype"), ROUTES)
triton_routes = pytest.mark.parametrize(("route", "dtype"), ROUTES[2:])
every_mode = pytest.mark.parametrize("mode", MODES)


def upstream(rows: int) -> Tensor:
    """[2, rows], different for every row, zero for every fourth."""
    out = torch.randn(2, rows, generator=torch.Generator().manual_seed(9))
    out[:, ::4] = 0.0
    return out


def compare(
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    entropy: bool = True,
    banned: list[int] | None = None,
    temperature: float = 1.0,
    tolerance: float = 2e-5,
    gradient: float = 4e-3,
    **how: Any,
) -> None:
    """Log-probs, entropies and both gradients against float64."""
    hidden, weight, targets = inputs
    twins = in_double(hidden, weight)
    count = 2 if entropy else 1
    grads = tuple(upstream(len(hidden))[:count])
    wanted = oracle(*twins, targets, temperature, banned or [])[:count]
    wanted_grads = torch.autograd.grad(wanted, twins, tuple(g.double() for g in grads))
    out = linear_logprob(
        hidden,
        weight,
        targets,
        temperature=temperature,
        banned=torch.tensor(banned) if banned else None,
        return_entropy=entropy,
        **how,
    )
    found = out if isinstance(out, tuple) else (out,)
    for value, right in zip(found, wanted, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach().double(), right.detach(), rtol=0, atol=tolerance)
    for value, right in zip(
        torch.autograd.grad(found, (hidden, weight), grads), wanted_grads, strict=True
    ):
        assert value.dtype == hidden.dtype and value.shape == right.shape
        assert off(value, right) < (gradient if value.dtype == torch.bfloat16 else 5e-6)


@every_route
@every_mode
@pytest.mark.parametrize(("temperature", "entropy"), [(0.7, True), (1.0, False)])
def test_accuracy(
    route: str, dtype: torch.dtype, mode: str, temperature: float, entropy: bool
) -> None:
    """Logits of deviation 4; 301 is a multiple of nothing, 40 not of a tile's rows."""
    inputs = draw(40, 301, 64, seed=3, dtype=dtype, spread=4.0)
    inputs[2][0] = 300  # the last column
    inputs[2][inputs[2] == 17] = 18
    how = {"temperature": temperature, "entropy": entropy, "chunk": 16}
    compare(inputs, route=route, mode=mode, banned=[0, 17] if entropy else None, **how)


@every_route
def test_outliers(route: str, dtype: torch.dtype) -> None:
    """Logits up to 400; targets are sampled, as a policy's are."""
    rng = torch.Generator().manual_seed(1)
    hidden, weight, targets = draw(32, 150, 32, seed=4, dtype=torch.float64, spread=4.0)
    with torch.no_grad():
        hidden[::4] *= 25.0
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        logits = hidden.double() @ weight.double().T
        targets = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    assert logits.abs().max() > 300
    compare((hidden, weight, targets), route=route, chunk=8, tolerance=1.2e-4)


@every_route
@every_mode
def test_extreme_rows(route: str, dtype: torch.dtype, mode: str) -> None:
    """Row 0: all logits near -1e4. Row 1: one-hot, p = 1. Row 2: uniform. Row 3: p = 1 - 1e-7."""
    weight = torch.eye(16, dtype=dtype).requires_grad_()
    hidden = torch.zeros(4, 16)
    hidden[0] = -1e4
    hidden[0, :3] += torch.tensor([64.0, 0.0, 128.0])
    hidden[1, 15] = 200.0
    hidden[3, 15] = 16.0
    targets = torch.tensor([2, 15, 4, 15])
    hidden = hidden.to(dtype).requires_grad_()
    wanted = oracle(*in_double(hidden, weight), targets, 1.0, [])
    logp, entropy = linear_logprob(
        hidden, weight, targets, return_entropy=True, route=route, mode=mode
    )
    torch.testing.assert_close(logp.detach().double(), wanted[0].detach(), rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(entropy.detach().double(), wanted[1].detach(), rtol=1e-5, atol=1e-15)
    assert -2e-6 < float(logp[3].detach()) < -1e-6  # not rounded to 0
    twins = in_double(hidden, weight)
    wanted_grads = torch.autograd.grad(oracle(*twins, targets, 1.0, [])[0].sum(), twins)
    grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    # Row 3's own probability is 1 - 1.7e-6: its gradient must not be 0, nor that of bf16's 1 - p.
    torch.testing.assert_close(grads[0][3].double(), wanted_grads[0][3], rtol=1e-2, atol=0)
    assert all(grad.isfinite().all() for grad in grads)


@triton_routes
@every_mode
@given(data=st.data())
@settings(max_examples=6)
def test_any_shape(route: str, dtype: torch.dtype, mode: str, data: Any) -> None:
    rows = data.draw(st.sampled_from([1, 2, 7, 33]), "rows")
    vocab = data.draw(st.sampled_from([1, 2, 15, 64, 129, 257]), "vocab")
    width = data.draw(st.sampled_from([8, 24, 64]), "width")
    banned = data.draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=vocab - 1))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 2.5]))
    entropy = data.draw(st.booleans())
    chunk = data.draw(st.sampled_from([1, 5, 64])) if rows < 8 else 16
    hidden, weight, targets = draw(rows, vocab, width, rows * vocab, dtype, spread=2.0)
    allowed = torch.tensor([v for v in range(vocab) if v not in banned])
    targets = allowed[targets % len(allowed)]
    twins = in_double(hidden, weight)
    grads = upstream(rows) + 1.0
    count = 2 if entropy else 1
    wanted = oracle(*twins, targets, temperature, banned)[:count]
    wanted_grads = torch.autograd.grad(wanted, twins, tuple(g.double() for g in grads[:count]))
    out = linear_logprob(
        hidden, weight, targets.int(), temperature=temperature, banned=torch.tensor(banned).int(),
        return_entropy=entropy, chunk=chunk, route=route, mode=mode,
    )  # fmt: skip
    found = out if isinstance(out, tuple) else (out,)
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=0, atol=2e-5)
    for value, right in zip(
        torch.autograd.grad(found, (hidden, weight), tuple(grads[:count])),
        wanted_grads,
        strict=True,
    ):
        # Measured against inputs of size 1: with few ids a gradient may vanish.
        error = (value.double() - right).norm() / (right.norm() + 1e-2 * right.numel() ** 0.5)
        assert error < (1.5e-2 if dtype == torch.bfloat16 else 1e-5)


@triton_routes
@every_mode
def test_any_layout(route: str, dtype: torch.dtype, mode: str) -> None:
    """Leading dimensions, strides, odd addresses, int32 targets; no view comes back."""
    hidden, weight, targets = draw(12, 50, 24, seed=5, dtype=dtype, spread=3.0)
    wanted = linear_logprob(hidden, weight, targets, route=route, mode=mode)
    assert not wanted._is_view()  # FSDP warns of views
    wanted_grads = torch.autograd.grad(wanted, (hidden, weight), upstream(12)[0])
    shaped = hidden.reshape(3, 4, 24).transpose(0, 1)
    odd = torch.cat([targets.new_zeros(1), targets]).int()[1:]  # at an address of 4 bytes
    assert odd.data_ptr() % 16
    strided = weight.T.contiguous().T
    found = linear_logprob(shaped, strided, odd.reshape(3, 4).T, route=route, mode=mode, chunk=5)
    assert found.shape == (4, 3) and not found._is_view() and shaped.requires_grad
    torch.testing.assert_close(found.T.reshape(-1), wanted, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(found, (hidden, weight), upstream(12)[0].reshape(3, 4).T)
    for value, right in zip(grads, wanted_grads, strict=True):
        assert off(value, right.double()) < 4e-3


@every_route
@every_mode
def test_no_rows_and_no_upstream(route: str, dtype: torch.dtype, mode: str) -> None:
    hidden, weight, targets = draw(0, 20, 8, dtype=dtype)
    logp, entropy = linear_logprob(
        hidden, weight, targets, return_entropy=True, route=route, mode=mode
    )
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,) and logp.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    assert weight.grad is not None and not weight.grad.any() and weight.grad.dtype == dtype
    hidden, weight, targets = draw(3, 20, 8, dtype=dtype)
    grads = torch.autograd.grad(
        linear_logprob(hidden, weight, targets, route=route, mode=mode),
        (hidden, weight),
        torch.zeros(3),
    )
    assert not any(grad.any() for grad in grads)


@every_route
@every_mode
def test_impossible_targets_on_a_device_are_counted(
    route: str, dtype: torch.dtype, mode: str
) -> None:
    """Out of range or banned: log-prob -inf, no gradient, and the other rows do not notice."""
    hidden, weight, targets = draw(6, 20, 8, dtype=dtype)
    targets = targets % 19
    banned = torch.tensor([19])
    how: dict[str, Any] = {"banned": banned, "return_entropy": True, "route": route, "mode": mode}
    wrong = targets.clone()
    wrong[:4] = torch.tensor([19, 20, -1, 2**40])
    faults.take("cpu")
    with faults.deferred():
        logp, entropy = linear_logprob(hidden, weight, wrong, **how)
        counts = faults.take("cpu")
        poison = torch.full((6,), float("nan"))
        poison[4:] = 1.0
        grads = torch.autograd.grad((logp, entropy), (hidden, weight), (poison, poison))
    assert counts[faults.TARGET_RANGE] == 3 and counts[faults.TARGET_BANNED] == 1
    assert (logp[:4] == -torch.inf).all() and not entropy.isnan().any()
    assert not grads[0][:4].any()
    rest = linear_logprob(hidden[4:], weight, targets[4:], **how)
    torch.testing.assert_close((logp[4:], entropy[4:]), rest, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(rest, (hidden, weight), (torch.ones(2), torch.ones(2)))
    for value, right in zip(grads, wanted, strict=True):
        assert off(value, right.double()) < 4e-3


@triton_routes
def test_worker_threads(route: str, dtype: torch.dtype) -> None:
    inputs = draw(9, 30, 16, dtype=dtype)
    here = linear_logprob(*inputs, route=route)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(linear_logprob, *inputs, route=route).result()
    assert torch.equal(here, there)


@triton_routes
def test_two_runs_give_the_same_bits(route: str, dtype: torch.dtype) -> None:
    def run() -> tuple[Tensor, ...]:
        hidden, weight, targets = draw(33, 130, 16, dtype=dtype)
        out = linear_logprob(hidden, weight, targets, return_entropy=True, route=route, chunk=9)
        return (*out, *torch.autograd.grad(out, (hidden, weight), tuple(upstream(33))))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@every_route
@every_mode
def test_no_rows_and_a_frozen_weight(route: str, dtype: torch.dtype, mode: str) -> None:
    hidden, weight, targets = draw(0, 9, 4, dtype=dtype)
    linear_logprob(hidden, weight.detach(), targets, route=route, mode=mode).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
