"""Log-probs of given tokens from hidden states and the output matrix, logits never kept.

One function for every model and stage; `route` names the implementation. The reference route
works in row chunks and recomputes each chunk's logits in the backward pass, so that its memory
does not grow with T x V.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speciarl.kernels import reference

ROUTES: tuple[str, ...] = ("auto", "reference")

# Bytes of one chunk's logits. Small chunks stay in a CPU's cache; a GPU wants 2k rows and more.
_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    banned: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    chunk: int | None = ...,
    route: str = ...,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    banned: Tensor | None = ...,
    return_entropy: Literal[True],
    chunk: int | None = ...,
    route: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    banned: Tensor | None = ...,
    return_entropy: bool,
    chunk: int | None = ...,
    route: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int | None = None,
    route: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight^T / temperature)[target] for every row.

    hidden: [..., H] floating; weight: [V, H] floating; targets: the leading shape of `hidden`,
    integer ids; banned: ids [K] whose logits become -inf, as in the sampler, or None; chunk: rows
    per step of the reference route, chosen by size where None.

    Returns log-probs in nats in the shape of `targets`, and with `return_entropy` also the
    entropies in nats. Both are fp32 (float64 if an input is), products and sums too, whatever the
    autocast mode. Differentiable once in `hidden` and `weight` for any upstream gradient; nothing
    is saved or computed for an input that needs no gradient. A banned target has log-prob -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit, a temperature that is not
    finite and positive, a chunk below 1 or an unknown route.
    """
    _check(hidden, weight, targets, banned)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature!r} must be finite and > 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk!r} must be at least 1")
    if route not in ROUTES:
        raise ValueError(f"route = {route!r} is unknown; known: {', '.join(ROUTES)}")
    ids = targets.long()
    banned = None if banned is None else banned.long()
    chunk = chunk or default_chunk(hidden, weight)
    logp, entropy = _LinearLogprob.apply(
        hidden, weight, ids, banned, temperature, return_entropy, chunk
    )
    return (logp, entropy) if return_entropy else logp


def default_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk of the reference route, for `hidden` [..., H] and `weight` [V, H]."""
    row_bytes = weight.shape[0] * reference.compute_dtype(hidden, weight).itemsize
    budget = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cuda"])
    return max(budget // row_bytes, 16)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        banned: Tensor | None,
        temperature: float,
        with_entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        with _without_autocast(hidden.device.type):
            logp, entropy = reference.logprob_forward(
                rows, weight, targets.reshape(-1), banned, temperature, with_entropy, chunk
            )
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(hidden, weight, targets, banned, entropy)
            ctx.temperature, ctx.chunk = temperature, chunk
        # Shaped here, not by the caller: FSDP warns of a module that returns a view.
        return _shaped(logp, targets), None if entropy is None else _shaped(entropy, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        unused = (None,) * 5
        if grad_logp is None and grad_entropy is None:
            return None, None, *unused
        hidden, weight, targets, banned, entropy = ctx.saved_tensors
        with _without_autocast(hidden.device.type):
            grads = reference.logprob_backward(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                targets.reshape(-1),
                banned,
                ctx.temperature,
                ctx.chunk,
                entropy=entropy,
                grad_logp=None if grad_logp is None else grad_logp.reshape(-1),
                grad_entropy=None if grad_entropy is None else grad_entropy.reshape(-1),
                need_hidden=ctx.needs_input_grad[0],
                need_weight=ctx.needs_input_grad[1],
            )
        return None if grads[0] is None else grads[0].reshape(hidden.shape), grads[1], *unused


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values if values.shape == like.shape else values.reshape(like.shape).clone()


def _without_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor | None) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be "
            "[..., H] and [V, H]"
        )
    if weight.shape[0] < 1:
        raise ValueError("weight must have at least one row")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets {list(targets.shape)} must have the leading shape of hidden, "
            f"{list(hidden.shape[:-1])}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
    for name, ids in (("targets", targets), ("banned", banned)):
        if ids is not None and not _is_integer(ids.dtype):
            raise ValueError(f"{name} must hold integer ids, not {ids.dtype}")
    if banned is not None and banned.dim() != 1:
        raise ValueError(f"banned {list(banned.shape)} must be a list of ids [K]")
    devices = {str(t.device) for t in (hidden, weight, targets, banned) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"hidden, weight, targets and banned lie on {sorted(devices)}")


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
