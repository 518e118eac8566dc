"""Log-probs of given tokens from hidden states and the output matrix, logits never kept.

One function for every model and stage; `route` names the implementation and `mode` what is kept
between forward and backward. See `routes` for how both are chosen, `problem.HeadRoute` for what a
route does; everything else is here and alike for all of them.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speciarl.kernels import faults, reference, routes
from speciarl.kernels.launch import on_device_of
from speciarl.kernels.problem import HeadRoute, Problem
from speciarl.kernels.products import LinearGradients
from speciarl.kernels.routes import MODES, ROUTES, Choice
from speciarl.kernels.shards import VocabShard

__all__ = ["MODES", "ROUTES", "VocabShard", "linear_logprob"]


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
    mode: str = ...,
    shard: VocabShard | None = ...,
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
    mode: str = ...,
    shard: VocabShard | None = ...,
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
    mode: str = ...,
    shard: VocabShard | None = ...,
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
    mode: str = "auto",
    shard: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight^T / temperature)[target] for every row.

    hidden: [..., H] floating; weight: [V, H] floating; targets: the leading shape of `hidden`,
    integer ids; banned: ids [K] whose logits become -inf, as in the sampler, or None; chunk: rows
    computed at once where a route needs memory for them, chosen by size where None.

    route: "reference" (plain torch, fp32 logits), "rows" (matrix products and a Triton kernel over
    their rows), "expsum" (one Triton kernel, no logits in memory; bf16), or "auto". mode, where a
    gradient is wanted: "store" keeps a table [T, V] in the input's type (the reference: fp32) for
    the backward pass; "recompute" keeps nothing of that size and computes it again, a chunk at a
    time; "auto" stores what fits well into a GPU's free memory. Without a gradient nothing is kept.

    shard: `weight` is a part of the vocabulary, the other processes of the group hold the rest;
    hidden, targets (ids of the whole vocabulary) and banned are alike on all. A collective call,
    and so is its backward pass. hidden's gradient is whole on every process, weight's is its part.

    Returns log-probs in nats in the shape of `targets`, and with `return_entropy` also the
    entropies in nats. Both are fp32 (float64 if an input is), products and sums too, whatever the
    autocast mode. Differentiable once in `hidden` and `weight` for any upstream gradient; nothing
    is saved or computed for an input that needs no gradient.

    Raises ValueError for shapes, dtypes or devices that do not fit, a temperature that is not
    finite and positive, a chunk below 1, an unknown route or mode or one that cannot run here, and
    on a CPU for targets that are out of range or banned. On a device those are counted
    (`kernels.faults`): their log-prob is -inf and has no gradient.
    """
    problem, ids = open_problem(hidden, weight, targets, temperature, banned, return_entropy, shard)
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    choice = routes.choose(hidden, weight, route=route, mode=mode, chunk=chunk, gradients=gradients)
    logp, entropy = _LinearLogprob.apply(hidden, weight, ids, problem, choice)
    return (logp, entropy) if return_entropy else logp


def open_problem(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    banned: Tensor | None,
    with_entropy: bool,
    shard: VocabShard | None,
) -> tuple[Problem, Tensor]:
    """The arguments of `linear_logprob`, checked, and the targets as int64."""
    _check(hidden, weight, targets, banned)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature!r} must be finite and > 0")
    if shard is not None:
        shard.check(len(weight))
    banned = None if banned is None or banned.numel() == 0 else banned.long()
    dtype = reference.compute_dtype(hidden, weight)
    problem = Problem(len(weight), dtype, banned, float(temperature), with_entropy, shard)
    ids = targets.long()
    _check_ids(problem, ids.reshape(-1))
    return problem, ids


def _check_ids(problem: Problem, ids: Tensor) -> None:
    faults.check_range("targets", ids, 0, problem.total)
    if problem.banned is not None:
        faults.check_range("banned", problem.banned, 0, problem.total)
    outside, forbidden = problem.impossible(ids)
    if not faults.immediate(ids):
        faults.count(faults.TARGET_RANGE, outside)
        if forbidden is not None:
            faults.count(faults.TARGET_BANNED, forbidden)
    elif forbidden is not None and forbidden.any():
        raise ValueError(f"targets holds {int(ids[forbidden][0])}, which is among the banned ids")


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, problem: Problem, choice: Choice
    ) -> tuple[Tensor, Tensor | None]:
        rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        with plain_arithmetic(hidden):
            route = routes.make(choice.route, problem, weight)
            table = route.table(len(rows)) if choice.mode == "store" else None
            sums, logp, entropy = _forward(route, problem, rows, ids, table, choice.chunk)
        if choice.mode != "forward":
            ctx.set_materialize_grads(False)
            kept = hidden if ctx.needs_input_grad[1] or table is None else None
            ctx.save_for_backward(kept, weight, ids, sums, logp.isneginf(), table)
            ctx.problem, ctx.choice = problem, choice
            ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        # Shaped here, not by the caller: FSDP warns of a module that returns a view.
        return _shaped(logp, targets), None if entropy is None else _shaped(entropy, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        unused = (None,) * 3
        if grad_logp is None and grad_entropy is None:
            return None, None, *unused
        hidden, weight, ids, sums, dead, table = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = None if hidden is None else hidden.reshape(-1, hidden.shape[-1])
        shard = ctx.problem.shard
        with plain_arithmetic(weight):
            route = routes.make(ctx.choice.route, ctx.problem, weight)
            grads = LinearGradients(
                len(ids),
                route.matrix,
                # What is added up over processes stays in fp32 until then.
                hidden_dtype=(ctx.problem.dtype if shard else ctx.dtype) if need_hidden else None,
                states=rows if need_weight else None,
            )
            upstream = _upstream(grad_logp, dead, sums), _upstream(grad_entropy, dead, sums)
            if grad_logp is None:
                upstream = torch.zeros_like(sums[0]), upstream[1]
            _backward(route, rows, ids, sums, table, ctx.choice.chunk, upstream, grads)
            if shard and grads.hidden is not None:
                shard.add_up(grads.hidden)
        return (
            None if grads.hidden is None else grads.hidden.reshape(ctx.shape).to(ctx.dtype),
            None if grads.weight is None else grads.weight.to(weight.dtype),
            *unused,
        )


def _forward(
    route: HeadRoute,
    problem: Problem,
    rows: Tensor,
    ids: Tensor,
    table: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Settled sums [k, T], log-probs [T] and entropies [T] or None."""
    if not len(rows):
        nothing = torch.empty(0, dtype=problem.dtype, device=rows.device)
        return nothing[None], nothing, nothing.clone() if problem.with_entropy else None
    parts = [
        route.sums(rows[part], ids[part], None if table is None else table[part])
        for part in pieces(len(rows), len(rows) if route.whole else chunk)
    ]
    sums = route.settle(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return sums, *route.finish(sums, ids, table)


def _backward(
    route: HeadRoute,
    rows: Tensor | None,
    ids: Tensor,
    sums: Tensor,
    table: Tensor | None,
    chunk: int,
    upstream: tuple[Tensor, Tensor | None],
    grads: LinearGradients,
) -> None:
    grad_logp, grad_entropy = upstream
    if table is not None:
        if not len(ids):
            return
        factor = route.gradient(table, ids, sums, grad_logp, grad_entropy)
        if grad_entropy is not None:
            # A second backward pass would find other values: let autograd notice.
            torch.autograd.graph.increment_version(table)
        grads.add(slice(0, len(ids)), table, factor)
        return
    assert rows is not None
    buffer = route.table(min(chunk, len(ids)))
    for part in pieces(len(ids), chunk):
        table = buffer[: part.stop - part.start]
        route.fill(rows[part], ids[part], sums[:, part], table)
        factor = route.gradient(
            table,
            ids[part],
            sums[:, part],
            grad_logp[part],
            None if grad_entropy is None else grad_entropy[part],
        )
        grads.add(part, table, factor)


def pieces(rows: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` rows, the largest first."""
    for start in range(0, rows, max(chunk, 1)):
        yield slice(start, min(start + chunk, rows))


def plain_arithmetic(tensor: Tensor) -> ExitStack:
    """Autocast off, and the tensor's device is where kernels start."""
    stack = ExitStack()
    stack.enter_context(on_device_of(tensor))
    if torch.amp.is_autocast_available(tensor.device.type):
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    return stack


def _upstream(grad: Tensor | None, dead: Tensor, sums: Tensor) -> Any:
    """An upstream gradient [T] as the kernels take it; impossible targets have none."""
    if grad is None:
        return None
    return grad.reshape(-1).to(sums.dtype).masked_fill(dead, 0.0).contiguous()


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    if values.shape == like.shape and not values._is_view():
        return values
    return values.reshape(like.shape).clone()


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
