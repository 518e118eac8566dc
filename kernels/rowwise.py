"""The route "rows": fp32 logits of a chunk by one matrix product, then one kernel over its rows.

The products are cuBLAS's; the kernels read a row of logits and write a few sums of it, and its
exponentials in the matrix's type where gradients are wanted. See `reference` for the maths: the
kernels are its `row_sums`, `gradient` and the exponential in between. A program has one row, and
rows are numbered along the first axis of the grid, which may be longer than 65,535.
"""
# mypy: disallow-untyped-defs=False
# Arguments of Triton functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from speciarl.kernels import reference
from speciarl.kernels.anchored import AnchoredHead
from speciarl.kernels.launch import interpreted
from speciarl.kernels.problem import Problem
from speciarl.kernels.products import wide_mm

DTYPES = (torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)
BLOCK = 4096
WARPS = 16
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _block(logits, allowed, columns, V, scale, BANNED: tl.constexpr):
    """Scaled logits of some columns, -inf where they do not count."""
    inside = columns < V
    z = tl.load(logits + columns, mask=inside, other=float("-inf")) * scale
    if BANNED:
        keep = tl.load(allowed + columns, mask=inside, other=0)
        z = tl.where(keep != 0, z, float("-inf"))
    return z


@triton.jit
def _exponentials(logits, table, allowed, column, anchor, V, scale, BANNED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """table[v] = exp(z[v] - anchor), 0 at the target's column."""
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _block(logits, allowed, columns, V, scale, BANNED)
        e = tl.where(columns == column, 0.0, tl.exp(z - anchor))
        tl.store(table + columns, e.to(table.dtype.element_ty), mask=columns < V)


@triton.jit(do_not_specialize=["T"])
def row_sums_kernel(
    logits, table, columns, allowed, sums,
    T, V, stride, table_stride, scale,
    BANNED: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [4, T]: anchor, the target's z, and over all other columns the sums of E and E ln E."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    column = tl.load(columns + row)
    anchor = tl.full((), LOWEST, tl.float32)
    others = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    target = tl.full((), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        here = start + tl.arange(0, BLOCK)
        z = _block(logits, allowed, here, V, scale, BANNED)
        at_target = here == column
        target = tl.maximum(target, tl.max(tl.where(at_target, z, float("-inf")), axis=0))
        higher = tl.maximum(anchor, tl.max(z, axis=0))
        shift = anchor - higher
        fade = tl.exp(shift)
        counts = (z != float("-inf")) & ~at_target
        d = tl.where(counts, z - higher, 0.0)
        e = tl.where(counts, tl.exp(d), 0.0)
        if ENTROPY:
            moment = fade * (moment + shift * others) + tl.sum(e * d, axis=0)
        others = fade * others + tl.sum(e, axis=0)
        anchor = higher
    tl.store(sums + row, anchor)
    tl.store(sums + T.to(tl.int64) + row, target)
    tl.store(sums + T.to(tl.int64) * 2 + row, others)
    tl.store(sums + T.to(tl.int64) * 3 + row, moment)
    if STORE:
        table += row * table_stride
        _exponentials(logits, table, allowed, column, anchor, V, scale, BANNED, BLOCK)


@triton.jit
def row_table_kernel(
    logits, table, columns, allowed, anchors,
    V, stride, table_stride, scale,
    BANNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The table alone, from anchors [T] known before."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    table += row * table_stride
    column, anchor = tl.load(columns + row), tl.load(anchors + row)
    _exponentials(logits, table, allowed, column, anchor, V, scale, BANNED, BLOCK)


@triton.jit(do_not_specialize=["T"])
def row_entropy_kernel(
    table, columns, coefficients, T, V, table_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """In place: E becomes g p + h p ln p, and what the coefficients say at the target.

    coefficients [4, T]: p / E, g, h, and the value at the target's column.
    """
    row = tl.program_id(0).to(tl.int64)
    table += row * table_stride
    column = tl.load(columns + row)
    scale = tl.load(coefficients + row)
    g = tl.load(coefficients + T.to(tl.int64) + row)
    h = tl.load(coefficients + T.to(tl.int64) * 2 + row)
    at_target = tl.load(coefficients + T.to(tl.int64) * 3 + row)
    for start in range(0, V, BLOCK):
        here = start + tl.arange(0, BLOCK)
        p = tl.load(table + here, mask=here < V, other=0.0).to(tl.float32) * scale
        plogp = tl.where(p > 0.0, p * tl.log(tl.maximum(p, 1e-38)), 0.0)
        value = tl.where(here == column, at_target, g * p + h * plogp)
        tl.store(table + here, value.to(table.dtype.element_ty), mask=here < V)


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    """Why this route cannot run `hidden` [..., H] and `weight` [V, H], or None if it can."""
    if hidden.dtype != weight.dtype or weight.dtype not in DTYPES:
        return f"it takes bf16 or fp32, both alike, not {hidden.dtype} and {weight.dtype}"
    if interpreted():
        return None
    if weight.device.type != "cuda":
        return (
            f"it needs CUDA tensors, these lie on {weight.device}; with TRITON_INTERPRET=1 set "
            "before Python starts, Triton's interpreter runs it on a CPU, slowly"
        )
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return None


class RowsHead(AnchoredHead):
    """bf16 or fp32; workspace of chunk x V x 4 bytes, and a table in the matrix's type."""

    def __init__(self, problem: Problem, weight: Tensor) -> None:
        super().__init__(problem, weight)
        self._logits: Tensor | None = None

    def table(self, rows: int) -> Tensor:
        ld = -(-self.problem.vocab // 8) * 8  # rows aligned to 16 bytes, whatever V is
        return self.matrix.new_empty(rows, ld)[:, : self.problem.vocab]

    def sums(self, hidden: Tensor, targets: Tensor, table: Tensor | None) -> Tensor:
        logits, columns = self._product(hidden), self.problem.columns(targets)
        sums = logits.new_empty(4, len(hidden))
        row_sums_kernel[(len(hidden),)](
            logits,
            logits if table is None else table,
            columns,
            logits if self.allowed is None else self.allowed,
            sums,
            len(hidden),
            self.problem.vocab,
            logits.stride(0),
            0 if table is None else table.stride(0),
            1.0 / self.problem.temperature,
            BANNED=self.allowed is not None,
            ENTROPY=self.problem.with_entropy,
            STORE=table is not None,
            BLOCK=self._block_size(),
            num_warps=WARPS,
        )
        return sums

    def fill(self, hidden: Tensor, targets: Tensor, sums: Tensor, table: Tensor) -> None:
        logits = self._product(hidden)
        row_table_kernel[(len(hidden),)](
            logits,
            table,
            self.problem.columns(targets),
            logits if self.allowed is None else self.allowed,
            sums[0].contiguous(),
            self.problem.vocab,
            logits.stride(0),
            table.stride(0),
            1.0 / self.problem.temperature,
            BANNED=self.allowed is not None,
            BLOCK=self._block_size(),
            num_warps=WARPS,
        )
        self._fix(table, targets, sums)

    def gradient(
        self,
        table: Tensor,
        targets: Tensor,
        sums: Tensor,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        if grad_entropy is None:
            return super().gradient(table, targets, sums, grad_logp, None)
        coefficients = reference.entropy_coefficients(sums, grad_logp, grad_entropy)
        row_entropy_kernel[(len(table),)](
            table,
            self.problem.columns(targets),
            coefficients,
            len(table),
            self.problem.vocab,
            table.stride(0),
            BLOCK=self._block_size(),
            num_warps=WARPS,
        )
        return torch.full_like(grad_logp, -1.0 / self.problem.temperature)

    def _block_size(self) -> int:
        return min(BLOCK, triton.next_power_of_2(self.problem.vocab))

    def _product(self, hidden: Tensor) -> Tensor:
        """hidden [C, H] . weight in fp32, [C, V]; the next call overwrites it."""
        if self._logits is None:
            shape = len(hidden), self.problem.vocab
            self._logits = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        return wide_mm(hidden, self.matrix.t(), out=self._logits[: len(hidden)])
