"""Who computes log-probs and their gradients in bench/head.py: our routes, peers, the limit.

A provider takes hidden states, matrix, targets and upstream gradients and returns log-probs [T],
d hidden and, unless the matrix is frozen, d matrix. Losses that only know a sum (torch's and
Liger's cross-entropy) get the upstream gradient that a sum has, 1 a token, and return no log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speciarl.kernels.fused import linear_policy_loss
from speciarl.kernels.head import linear_logprob
from speciarl.kernels.loss import LossSpec


class Inputs(NamedTuple):
    """hidden [T, H], matrix [V, H], targets [T] int64, upstream [T]: d loss / d log-prob."""

    hidden: Tensor
    matrix: Tensor
    targets: Tensor
    upstream: Tensor

    @property
    def wanted(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.matrix) if tensor.requires_grad]


@dataclass(frozen=True)
class Provider:
    """`run(inputs, backward)`; `uniform`: its upstream gradient is 1 a token, whatever it is given;
    `kind`: "ours", "peer", or "limit" (the matrix products alone; returns nothing)."""

    run: Callable[[Inputs, bool], list[Tensor]]
    kind: str = "peer"
    uniform: bool = False
    forward: bool = True


def _differentiated(logprob: Callable[[Inputs], Tensor]) -> Callable[[Inputs, bool], list[Tensor]]:
    def run(inputs: Inputs, backward: bool) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [logprob(inputs)]
        logp = logprob(inputs)
        upstream = inputs.upstream.to(logp.dtype)
        return [logp.detach(), *torch.autograd.grad(logp, inputs.wanted, upstream)]

    return run


def _summed(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs, bool], list[Tensor]]:
    """`loss` is minus the sum of the log-probs."""

    def run(inputs: Inputs, backward: bool) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                loss(inputs)
            return []
        ones = torch.full((), -1.0, device=inputs.hidden.device)
        value = loss(inputs)
        return list(torch.autograd.grad(value, inputs.wanted, ones.to(value.dtype)))

    return run


def plain(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    """The usual route: all logits, in fp32 or wider, then log_softmax."""
    logits = hidden @ matrix.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


@cache
def _compiled() -> Any:
    return torch.compile(plain, dynamic=True)


def ours(route: str, mode: str = "auto", chunk: int | None = None) -> Provider:
    """`linear_logprob` by one route and mode."""

    def logprob(inputs: Inputs) -> Tensor:
        return linear_logprob(
            inputs.hidden, inputs.matrix, inputs.targets, route=route, mode=mode, chunk=chunk
        )

    return Provider(_differentiated(logprob), "ours")


def chunked(route: str, chunk: int | None = None) -> Provider:
    """`linear_policy_loss`: the loss coefficients are known chunk by chunk.

    Every token is its own sequence of weight 1 and ratio 1, where d loss / d log-prob = -A.
    """
    spec = LossSpec(kl_coef=0.0)

    def run(inputs: Inputs, backward: bool) -> list[Tensor]:
        rows = len(inputs.targets)
        loss, _ = linear_policy_loss(
            inputs.hidden,
            inputs.matrix,
            inputs.targets,
            old=None,
            advantages=-inputs.upstream.float(),
            weights=torch.ones(rows, device=inputs.hidden.device),
            sequence_ids=torch.arange(rows, device=inputs.hidden.device),
            spec=spec,
            chunk=chunk,
            route=route,
        )
        return list(torch.autograd.grad(loss, inputs.wanted))

    return Provider(run, "ours", forward=False)


def products(inputs: Inputs, backward: bool) -> list[Tensor]:
    """The matrix products that nobody can do without, by cuBLAS in the inputs' type."""
    hidden, matrix = inputs.hidden.detach(), inputs.matrix.detach()
    logits = hidden @ matrix.T
    if backward:
        logits @ matrix
        if inputs.matrix.requires_grad:
            logits.T @ hidden
    return []


def liger(reduction: str) -> Provider:
    """Liger-Kernel's fused linear cross-entropy (Triton), summed or per token."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(inputs: Inputs) -> Tensor:
        hidden, matrix, targets, _ = inputs
        out = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, matrix, targets, None, None, -100, 0.0, 0.0, reduction
        )
        return out[0] if isinstance(out, tuple) else out

    if reduction == "sum":
        return Provider(_summed(loss), uniform=True)
    return Provider(_differentiated(lambda inputs: -loss(inputs)))


def trl() -> Provider:
    """TRL's chunked log-prob, with the vocabulary chunk that its trainer uses."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    def logprob(inputs: Inputs) -> Tensor:
        hidden, matrix, targets, _ = inputs
        arguments = (hidden, matrix, None, targets, 1.0, columns, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return Provider(_differentiated(logprob))


def torch_fused() -> Provider:
    """torch.nn.functional.linear_cross_entropy (torch 2.13), its chunked path."""
    function = torch.nn.functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(inputs: Inputs) -> Tensor:
        hidden, matrix, targets, _ = inputs
        return function(hidden, matrix, targets, reduction="sum", options=options)

    return Provider(_summed(loss), uniform=True)


OURS: dict[str, Callable[[], Provider]] = {
    "expsum": lambda: ours("expsum", "store"),
    "expsum-chunked": lambda: chunked("expsum"),
    "expsum-recompute": lambda: ours("expsum", "recompute"),
    "rows": lambda: ours("rows", "store"),
    "rows-chunked": lambda: chunked("rows"),
    "reference": lambda: ours("reference"),
    "reference-chunked": lambda: chunked("reference"),
}
PEERS: dict[str, Callable[[], Provider]] = {
    "materialised": lambda: Provider(_differentiated(lambda i: plain(*i[:3]))),
    "torch.compile": lambda: Provider(_differentiated(lambda i: _compiled()(*i[:3]))),
    "linear_cross_entropy": torch_fused,
    "liger-sum": lambda: liger("sum"),
    "liger-per-token": lambda: liger("none"),
    "trl": trl,
}
LIMIT: dict[str, Callable[[], Provider]] = {"products": lambda: Provider(products, "limit")}


def available(names: list[str] | None = None) -> tuple[dict[str, Provider], dict[str, str]]:
    """Providers by name, and for those that this environment lacks, why."""
    known = OURS | PEERS | LIMIT
    found, missing = {}, {}
    for name in names or known:
        try:
            found[name] = known[name]()
        except (ImportError, AttributeError) as error:  # not installed, or a version without it
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
