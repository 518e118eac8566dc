"""The policy-gradient loss of packed tokens: PPO clip, dual clip, KL, importance, entropy.

Aggregation is in the weights: one number per sequence with the global denominator already in it,
so that losses, gradients and statistics of micro-batches and ranks add up.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speciarl.kernels import faults, reference
from speciarl.kernels.launch import use_triton

KINDS: tuple[str, ...] = ("grpo", "cispo", "gspo")
KL_KINDS: tuple[str, ...] = ("k1", "k2", "k3")

STATS: tuple[str, ...] = (
    "tokens",
    "clipped_low",
    "clipped_high",
    "dual_clipped",
    "ratio",
    "kl_k1",
    "kl_k3",
    "engine_mismatch",
    "engine_k1",
    "engine_k3",
    "engine_weight_squared",
    "importance_weight",
    "entropy",
    "loss",
    "engine_mismatch_max",
)
"""Sums over the tokens of weighted sequences, in nats where they are log-probs, that add over
micro-batches and ranks; the last one is a maximum and combines by max. `loss` is the weighted sum
that the function returns. The clip counts are of tokens whose policy gradient the clip removed;
under "cispo", whose weight it held. `ratio` is the sequence's under "gspo".

The figures of the engine are 0 where its log-probs are not given. Of a token's weight
w = exp(old - engine), k1 = -ln w and k3 = w - 1 - ln w estimate KL(engine || trainer) (Schulman,
"Approximating KL divergence"); their sums give that of w: tokens + engine_k3 - engine_k1. In these
three ln w is held within 30 nats, so that w^2 is finite in fp32; `engine_mismatch` is |ln w| as it
is."""


@dataclass(frozen=True)
class LossSpec:
    """Coefficients of the loss; coefficients of 0 switch a term off."""

    kind: str = "grpo"
    """One of KINDS, see `policy_loss`. Dr.GRPO and DAPO are weights and clips of "grpo"."""
    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low where the advantage is negative ("cispo": always); in
    [0, 1], and 1 holds nothing."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high where the advantage is positive ("cispo": always)."""
    dual_clip: float | None = 3.0
    """Largest ratio where the advantage is negative (Ye et al., 1912.09729); above 1, or None.
    "cispo" has none: its clip holds both signs."""
    kl: str = "k3"
    """Estimator of the KL divergence from the reference, one of KL_KINDS."""
    kl_coef: float = 0.01
    """Factor of the KL term in the loss; needs `ref` unless 0."""
    importance_cap: float | None = None
    """Cap of exp(old - engine) as a factor of the policy term; needs `engine`. None: no factor."""
    entropy_coef: float = 0.0
    """Factor of the entropy that the loss rewards; needs `entropy` unless 0."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low = {self.clip_low!r} must be in [0, 1]")
        if not (math.isfinite(self.clip_high) and self.clip_high >= 0):
            raise ValueError(f"clip_high = {self.clip_high!r} must be finite and at least 0")
        dual = self.dual_clip
        if dual is not None and not (math.isfinite(dual) and dual > 1):
            raise ValueError(f"dual_clip = {dual!r} must be finite and above 1, or None")
        if self.kl not in KL_KINDS:
            raise ValueError(f"kl = {self.kl!r} is unknown; known: {', '.join(KL_KINDS)}")
        cap = self.importance_cap
        if cap is not None and not (math.isfinite(cap) and cap > 0):
            raise ValueError(f"importance_cap = {cap!r} must be finite and above 0, or None")
        for name in ("kl_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r} must be finite")


class Gradients(NamedTuple):
    """Loss [], statistics [len(STATS)], and d loss / d column [T], None where not wanted."""

    loss: Tensor
    stats: Tensor
    new: Tensor
    ref: Tensor | None
    entropy: Tensor | None


def policy_loss(
    new: Tensor,
    old: Tensor,
    *,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    spec: LossSpec,
    ref: Tensor | None = None,
    engine: Tensor | None = None,
    entropy: Tensor | None = None,
    route: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weights[s] x loss(token), s = sequence_ids[token], and its statistics.

    With A = advantages[s] and ratio = exp(new - old), a token's loss is policy x importance
    + kl_coef x KL(new, ref) - entropy_coef x entropy, where importance is
    min(exp(old - engine), importance_cap), and policy is, by `spec.kind`,
      grpo   max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), at most -A dual_clip
             where A < 0 (PPO, 1707.06347; GRPO, 2402.03300; DAPO's two clips, 2503.14476);
      gspo   the same with the sequence's ratio exp(mean of new - old over its tokens), as
             GSPO-token writes it: sg(ratio) exp(new - sg(new)) (2507.18071, section 4.3);
      cispo  -A sg(clip(ratio, 1 - clip_low, 1 + clip_high)) new (MiniMax-M1, 2506.13585, eq. 4);
    sg stops the gradient. "gspo" needs all tokens of a sequence in one call.

    new, old, ref, engine, entropy: [T] fp32, log-probs (and entropies) in nats, finite; log-ratios
    beyond 60 nats count as 60. advantages, weights: [S] fp32. sequence_ids: [T] integer, in [0, S),
    in any order. Gradients flow to `new`, `ref` and `entropy`. A sequence of weight 0 adds nothing
    anywhere, whatever its columns hold.

    route: "reference", "triton" (one launch; "gspo" two), or "auto": triton where it can run.

    Returns the loss, a scalar, and the statistics [len(STATS)], detached, in the dtype of `new`.
    The same inputs give the same bits on the Triton route. Raises ValueError for shapes, dtypes or
    devices that do not fit, where `spec` asks for an input that is not given, for a route that
    cannot run, and for an id out of range (on a device it is counted instead: `kernels.faults`).
    """
    return _PolicyLoss.apply(
        new, ref, entropy, old, engine, advantages, weights, sequence_ids, spec, route
    )


@torch.no_grad()
def policy_gradients(
    new: Tensor,
    old: Tensor,
    *,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    spec: LossSpec,
    ref: Tensor | None = None,
    engine: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_gradient: bool = False,
    route: str = "auto",
) -> Gradients:
    """`policy_loss` and its gradients, without autograd.

    The gradient of `ref` is None unless `ref_gradient` asks for it and the KL term is on, that of
    `entropy` unless the entropy term is on.
    """
    columns = {"old": old, "ref": ref, "engine": engine, "entropy": entropy}
    _check(new, columns, advantages, weights, sequence_ids)
    _check_needed(spec, columns)
    triton = use_triton(route, new.device)
    if triton and new.dtype != torch.float32:
        if route == "triton":
            raise ValueError(f"route = 'triton' needs fp32 columns, not {new.dtype}")
        triton = False
    faults.check_range("sequence_ids", sequence_ids, 0, len(weights))
    wants_ref = ref_gradient and ref is not None and spec.kl_coef != 0
    if triton:
        from speciarl.kernels import loss_kernel

        return Gradients(
            *loss_kernel.launch(
                new, old, advantages, weights, sequence_ids, ref, engine, entropy, wants_ref, spec
            )
        )
    leaves = {"new": new.detach().requires_grad_()}
    if wants_ref and ref is not None:
        leaves["ref"] = ref = ref.detach().requires_grad_()
    if entropy is not None and spec.entropy_coef != 0:
        leaves["entropy"] = entropy = entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss, stats = reference.policy_loss(
            leaves["new"],
            old,
            advantages,
            weights,
            sequence_ids,
            ref,
            engine,
            entropy,
            **asdict(spec),
        )
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return Gradients(loss.detach(), stats, grads["new"], grads.get("ref"), grads.get("entropy"))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        new: Tensor,
        ref: Tensor | None,
        entropy: Tensor | None,
        old: Tensor,
        engine: Tensor | None,
        advantages: Tensor,
        weights: Tensor,
        sequence_ids: Tensor,
        spec: LossSpec,
        route: str,
    ) -> tuple[Tensor, Tensor]:
        found = policy_gradients(
            new,
            old,
            advantages=advantages,
            weights=weights,
            sequence_ids=sequence_ids,
            spec=spec,
            ref=ref,
            engine=engine,
            entropy=entropy,
            ref_gradient=ctx.needs_input_grad[1],
            route=route,
        )
        ctx.save_for_backward(found.new, found.ref, found.entropy)
        ctx.mark_non_differentiable(found.stats)
        return found.loss, found.stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        scaled = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return *scaled, *(None,) * 7


def _check(
    new: Tensor,
    columns: dict[str, Tensor | None],
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
) -> None:
    if new.dim() != 1 or new.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"new must be fp32 [T], not {new.dtype} {list(new.shape)}")
    for name, column in columns.items():
        if column is not None and (column.shape != new.shape or column.dtype != new.dtype):
            raise ValueError(
                f"{name} must be {new.dtype} {list(new.shape)} like new, "
                f"not {column.dtype} {list(column.shape)}"
            )
    integer = not sequence_ids.dtype.is_floating_point and sequence_ids.dtype != torch.bool
    if sequence_ids.shape != new.shape or not integer:
        raise ValueError(
            f"sequence_ids must be integers {list(new.shape)}, "
            f"not {sequence_ids.dtype} {list(sequence_ids.shape)}"
        )
    if advantages.dim() != 1 or advantages.shape != weights.shape:
        raise ValueError(
            f"advantages {list(advantages.shape)} and weights {list(weights.shape)} must be [S]"
        )
    if len(new) and not len(weights):
        raise ValueError(f"weights is empty, but new holds {len(new)} tokens of some sequence")
    tensors = {"advantages": advantages, "weights": weights, "sequence_ids": sequence_ids} | columns
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != new.device:
            raise ValueError(f"{name} lies on {tensor.device}, new on {new.device}")


def _check_needed(spec: LossSpec, columns: dict[str, Tensor | None]) -> None:
    for name, column in (
        ("kl_coef", "ref"),
        ("importance_cap", "engine"),
        ("entropy_coef", "entropy"),
    ):
        if getattr(spec, name) and columns[column] is None:
            raise ValueError(f"{name} = {getattr(spec, name)!r} needs the column {column!r}")
