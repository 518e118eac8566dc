"""The policy loss straight from hidden states, chunk by chunk, its gradient made on the way.

Once a chunk's log-probs are known so is the loss's gradient in them, so the chunk's table of
exponentials becomes gradients at once: nothing is computed twice and no table outlives its chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speciarl.kernels import routes
from speciarl.kernels.head import open_problem, pieces, plain_arithmetic
from speciarl.kernels.loss import STATS, LossSpec, policy_gradients
from speciarl.kernels.problem import Problem
from speciarl.kernels.products import LinearGradients
from speciarl.kernels.routes import Choice


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    old: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    spec: LossSpec,
    ref: Tensor | None = None,
    engine: Tensor | None = None,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    chunk: int | None = None,
    route: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`policy_loss` of `linear_logprob`, with one chunk's table [chunk, V] as its whole workspace.

    hidden [T, H], weight [V, H], targets [T], temperature, banned, chunk and route are those of
    `head.linear_logprob`; old, ref, engine [T], advantages, weights [S], sequence_ids [T] and spec
    those of `loss.policy_loss`. old: None where the policy has not moved since it sampled: the
    new log-probs, without gradient. Entropies are computed if `spec` rewards them.

    The gradients are computed with the loss and the backward pass only scales them, so there is one
    backward pass; the weight's is summed over chunks in fp32. Returns the loss, a scalar, and its
    statistics [len(STATS)], detached. Differentiable once in `hidden` and `weight`; `ref` gets no
    gradient.

    Raises ValueError as those two functions do, and for "gspo", whose ratios need every token of a
    sequence before the first gradient.
    """
    if spec.kind == "gspo":
        raise ValueError(
            "spec.kind = 'gspo' has no chunked form: use linear_logprob and policy_loss "
            '(model.head_mode = "store" or "recompute")'
        )
    if targets.dim() != 1:
        raise ValueError(f"targets {list(targets.shape)} must be [T]")
    columns = {"old": old, "ref": ref, "engine": engine, "sequence_ids": sequence_ids}
    for name, column in columns.items():
        if column is not None and column.shape != targets.shape:
            raise ValueError(f"{name} {list(column.shape)} must be {list(targets.shape)}")
    with_entropy = spec.entropy_coef != 0
    problem, ids = open_problem(hidden, weight, targets, temperature, banned, with_entropy, None)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    choice = routes.choose(
        hidden, weight, route=route, mode="recompute", chunk=chunk, gradients=wanted
    )
    sequences = {"advantages": advantages, "weights": weights, "spec": spec}
    return _LinearPolicyLoss.apply(hidden, weight, ids, problem, choice, columns, sequences)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        problem: Problem,
        choice: Choice,
        columns: dict[str, Tensor | None],
        sequences: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with plain_arithmetic(hidden):
            route = routes.make(choice.route, problem, weight)
            grads = None
            if choice.mode != "forward":
                grads = LinearGradients(
                    len(hidden),
                    route.matrix,
                    hidden_dtype=hidden.dtype if need_hidden else None,
                    states=hidden if need_weight else None,
                    lean=True,
                )
            loss, stats = _chunks(route, problem, choice, hidden, ids, columns, sequences, grads)
        ctx.mark_non_differentiable(stats)
        if grads is not None:
            total = None if grads.weight is None else grads.weight.to(weight.dtype)
            ctx.grads = grads.hidden, total
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError("linear_policy_loss has one backward pass: its gradients are gone")
        # Handed over, not kept: autograd copies what it does not own.
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in grads]
        return *scaled, *(None,) * 5


def _chunks(
    route: routes.HeadRoute,
    problem: Problem,
    choice: Choice,
    hidden: Tensor,
    ids: Tensor,
    columns: dict[str, Tensor | None],
    sequences: dict[str, Any],
    grads: LinearGradients | None,
) -> tuple[Tensor, Tensor]:
    """Loss and statistics; the gradients are added to `grads` unless it is None."""
    loss = torch.zeros((), dtype=problem.dtype, device=hidden.device)
    stats = torch.zeros(len(STATS), dtype=problem.dtype, device=hidden.device)
    table = None if grads is None else route.table(min(choice.chunk, len(ids)))
    for part in pieces(len(ids), choice.chunk):
        mine = None if table is None else table[: part.stop - part.start]
        sums = route.settle(route.sums(hidden[part], ids[part], mine))
        logp, entropy = route.finish(sums, ids[part], mine)
        given: dict[str, Any] = {
            name: None if x is None else x[part] for name, x in columns.items()
        }
        if given["old"] is None:
            given["old"] = logp
        found = policy_gradients(logp, entropy=entropy, **given, **sequences)
        loss += found.loss
        stats = torch.cat([(stats + found.stats)[:-1], torch.maximum(stats, found.stats)[-1:]])
        if grads is not None:
            assert mine is not None
            dead = logp.isneginf()  # impossible targets have no gradient
            upstream = found.new.masked_fill(dead, 0.0)
            bonus = None if found.entropy is None else found.entropy.masked_fill(dead, 0.0)
            grads.add(part, mine, route.gradient(mine, ids[part], sums, upstream, bonus))
    return loss, stats
