"""Matrix products that sum and stay in fp32, and the gradients of a linear map made from them."""

from functools import cache

import torch
from torch import Tensor


def wide_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] in fp32 (float64 for float64), whatever the operands' own type.

    A CPU multiplies fp32 copies; CUDA keeps the operands and only the result is wider.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.device.type != "cuda":
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def wide_addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [M, N] += a [M, K] @ b [K, N], with `total` fp32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        total.addmm_(a, b)
    elif a.device.type == "cuda" and _fused_sum_works(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        for rows in _blocks(len(total), 16384):
            total[rows].add_(wide_mm(a[rows], b))


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@cache
def _fused_sum_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` adds half-precision products to an fp32 matrix in place, and rightly so.

    Releases of torch differ: some refuse it. The sums here are not representable in `dtype`.
    """
    rows = torch.arange(64 * 32, device=device).reshape(64, 32) % 13
    a, b = rows.to(dtype), (rows.t() % 7).contiguous().to(dtype)
    total = torch.full((64, 64), 1000.0 + 2.0**-10, device=device)
    wanted = total + a.float() @ b.float()
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # an engine's refusal
        return False
    return torch.equal(total, wanted)


class LinearGradients:
    """Gradients of `hidden` [T, H] and `weight` [V, H] from dL/d(hidden . weight), row by row.

    A chunk of it comes as a table [C, V] and one factor [C] a row. `matrix` is the weight in the
    table's type. hidden_dtype: of hidden's gradient, None if it is not needed. states: hidden if
    the weight's gradient is needed, else None; that gradient is summed over chunks in fp32.

    lean: no memory besides the gradients, if hidden's has the table's type; it is then rounded to
    that type before the factor and after it, else once.
    """

    def __init__(
        self,
        rows: int,
        matrix: Tensor,
        *,
        hidden_dtype: torch.dtype | None,
        states: Tensor | None,
        lean: bool = False,
    ) -> None:
        self._rows, self._matrix, self._states = rows, matrix, states
        self._lean = lean and hidden_dtype == matrix.dtype
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        if hidden_dtype is not None:
            self.hidden = matrix.new_empty(rows, matrix.shape[1], dtype=hidden_dtype)
        if states is not None and rows == 0:
            self.weight = torch.zeros_like(matrix)

    def add(self, part: slice, table: Tensor, factor: Tensor) -> None:
        """The rows `part`: table [C, V], factor [C]."""
        factor = factor[:, None]
        if self._states is not None:
            states = self._states[part]
            if self._lean and self.hidden is not None:
                scaled = self.hidden[part]  # not written yet
            else:
                scaled = torch.empty_like(states, dtype=table.dtype)
            self._add_weight(table, torch.mul(states, factor, out=scaled))
        if self.hidden is None:
            return
        out = self.hidden[part]
        if self._lean:
            torch.mm(table, self._matrix, out=out).mul_(factor)
        else:
            torch.mul(wide_mm(table, self._matrix), factor, out=out)

    def _add_weight(self, table: Tensor, scaled: Tensor) -> None:
        if len(table) < self._rows:
            if self.weight is None:
                self.weight = wide_mm(table.t(), scaled)
            else:
                wide_addmm(self.weight, table.t(), scaled)
        elif table.device.type == "cuda":
            # One chunk is all: cuBLAS sums in fp32 and rounds once, without a matrix in fp32.
            self.weight = torch.mm(table.t(), scaled)
        else:
            self.weight = wide_mm(table.t(), scaled)
