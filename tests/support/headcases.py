"""Inputs and oracles of the linear log-prob, and probes of what a call computes and keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUTES = [
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("rows", torch.float32),
    ("rows", torch.bfloat16),
    ("expsum", torch.bfloat16),
]
"""Every route with every type that it is made for."""


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
    rows: int,
    vocab: int,
    width: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    spread: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, width], weight [vocab, width], targets; spread: the logits' deviation."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=rng, dtype=torch.float64)
    if spread is not None:
        weight *= spread / width**0.5
    targets = torch.randint(vocab, (rows,), generator=rng)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def in_double(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same values as float64 leaves."""
    return tuple(tensor.detach().double().requires_grad_() for tensor in tensors)


def off(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((found.double() - wanted).norm() / wanted.norm())


class Record(TorchDispatchMode):
    """Names of the operators called, and the largest tensors that any of them made.

    `largest` counts entries, `bytes` bytes; `ignored` holds shapes that do not count as bytes.
    """

    def __init__(self, ignored: tuple[tuple[int, ...], ...] = ()) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = self.bytes = 0
        self.ignored = ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
            if tuple(out.shape) not in self.ignored:
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out

    @property
    def products(self) -> int:
        return sum(name in ("mm", "addmm", "addmm_") for name in self.names)


def keep_saved(saved: list[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Within it, every tensor that autograd saves for a backward pass joins the list."""

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
