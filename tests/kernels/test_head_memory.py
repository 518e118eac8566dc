"""What every route of the linear log-prob keeps, makes and leaves out.

Triton routes run under the interpreter.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headcases import ROUTES, Record, draw, keep_saved
from speciarl.kernels import products
from speciarl.kernels.head import linear_logprob
from speciarl.kernels.products import LinearGradients

pytest.importorskip("triton")

every_route = pytest.mark.parametrize(("route", "dtype"), ROUTES)
triton_routes = pytest.mark.parametrize(("route", "dtype"), ROUTES[2:])
every_mode = pytest.mark.parametrize("mode", ("store", "recompute"))


@triton_routes
@every_mode
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs(route: str, dtype: torch.dtype, mode: str, frozen: str) -> None:
    """The other gradient stays the same; of the frozen input's there is no trace, saved or made."""
    hidden, weight, targets = draw(20, 40, 16, dtype=dtype)
    logp = linear_logprob(hidden, weight, targets, route=route, mode=mode, chunk=8)
    both = torch.autograd.grad(logp.sum(), (hidden, weight))
    if frozen == "weight":
        leaf, args = hidden, (hidden, weight.detach())
    else:
        leaf, args = weight, (hidden.detach(), weight)
    saved: list[Tensor] = []
    with keep_saved(saved):
        logp = linear_logprob(*args, targets, route=route, mode=mode, chunk=8)
    (found,) = torch.autograd.grad(logp.sum(), (leaf,))
    assert torch.equal(found, both[0 if frozen == "weight" else 1])
    if frozen == "weight" and mode == "store":
        assert not any(t.shape == hidden.shape for t in saved)


@every_route
def test_forward_keeps_nothing_and_makes_no_table(route: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = draw(64, 96, 8, dtype=dtype)
    saved: list[Tensor] = []
    with Record() as record, keep_saved(saved), torch.no_grad():
        linear_logprob(hidden, weight, targets, return_entropy=True, route=route, chunk=8)
    assert not saved
    assert record.bytes <= 4 * 96 * 8 < 2 * 96 * 64  # a chunk's fp32 logits, or the matrix


@pytest.fixture
def no_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products without the fp32 copies of operands that only a CPU makes."""

    def shaped(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is not None:
            return out.zero_()
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(products, "wide_mm", shaped)
    monkeypatch.setattr(products, "wide_addmm", lambda total, a, b: None)
    yield


@pytest.mark.usefixtures("no_products")
def test_recompute_has_the_memory_of_a_chunk() -> None:
    rows, vocab, width, chunk = 64, 264, 8, 16
    hidden, weight, targets = draw(rows, vocab, width, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    with Record(ignored=((vocab, width),)) as record:
        with keep_saved(saved):
            logp = linear_logprob(
                hidden, weight, targets, route="expsum", mode="recompute", chunk=chunk
            )
        logp.sum().backward()
    assert max(t.numel() for t in saved) == weight.numel() < rows * vocab
    assert record.bytes <= chunk * vocab * 2


def test_sums_over_chunks_stay_in_fp32() -> None:
    """600 chunks of one row: a sum in bf16 would stop growing at 256 times a term."""
    states = torch.ones(600, 8, dtype=torch.bfloat16)
    matrix = torch.zeros(4, 8, dtype=torch.bfloat16)
    grads = LinearGradients(600, matrix, hidden_dtype=torch.bfloat16, states=states)
    table = torch.tensor([[1.0, 2.0, 0.0, -1.0]], dtype=torch.bfloat16)
    for row in range(600):
        grads.add(slice(row, row + 1), table, torch.full((1,), 0.5))
    assert grads.weight is not None and grads.weight.dtype == torch.float32
    assert torch.equal(grads.weight[:, 0], torch.tensor([300.0, 600.0, 0.0, -300.0]))
