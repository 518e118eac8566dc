"""The policy-gradient loss of packed tokens: PPO clip, dual clip, KL, importance, entropy.

Aggregation is in the weights: one number per sequence with the global denominator already in it,
so that losses, gradients and statistics of micro-batches and ranks add up.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from speciarl.kernels import reference

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
    "importance_weight",
    "entropy",
    "loss",
    "engine_mismatch_max",
)
"""Sums over the tokens of weighted sequences, in nats where they are log-probs, that add over
micro-batches and ranks; the last one is a maximum and combines by max. `loss` is the weighted sum
that the function returns; the clip counts are of tokens whose policy gradient the clip removed."""


@dataclass(frozen=True)
class LossSpec:
    """Coefficients of the loss; coefficients of 0 switch a term off."""

    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low where the advantage is negative; in [0, 1)."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high where the advantage is positive; in [0, 1)."""
    dual_clip: float | None = 3.0
    """Largest ratio where the advantage is negative (Ye et al., 1912.09729); above 1, or None."""
    kl: str = "k3"
    """Estimator of the KL divergence from the reference, one of KL_KINDS."""
    kl_coef: float = 0.01
    """Factor of the KL term in the loss; needs `ref` unless 0."""
    importance_cap: float | None = None
    """Cap of exp(old - engine) as a factor of the policy term; needs `engine`. None: no factor."""
    entropy_coef: float = 0.0
    """Factor of the entropy that the loss rewards; needs `entropy` unless 0."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value!r} must be in [0, 1)")
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
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weights[s] x loss(token), s = sequence_ids[token], and its statistics.

    With A = advantages[s] and ratio = exp(new - old), a token's loss is
        max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip,
        x min(exp(old - engine), importance_cap)  + kl_coef x KL(new, ref)  - entropy_coef x entropy
    (PPO, 1707.06347; GRPO, 2402.03300; DAPO's separate clips, 2503.14476).

    new, old, ref, engine, entropy: [T] fp32, log-probs (and entropies) in nats, finite; log-ratios
    beyond 60 nats count as 60. advantages, weights: [S] fp32. sequence_ids: [T] integer, in [0, S).
    Gradients flow to `new`, `ref` and `entropy`. A sequence of weight 0 adds nothing anywhere.

    Returns the loss, a scalar, and the statistics [len(STATS)], detached, in the dtype of `new`.
    Raises ValueError for shapes or dtypes that do not fit, or where `spec` asks for an input that
    is not given.
    """
    _check(new, {"old": old, "ref": ref, "engine": engine, "entropy": entropy}, sequence_ids)
    if advantages.dim() != 1 or advantages.shape != weights.shape:
        raise ValueError(
            f"advantages {list(advantages.shape)} and weights {list(weights.shape)} must be [S]"
        )
    for name, column, given in (
        ("kl_coef", "ref", ref),
        ("importance_cap", "engine", engine),
        ("entropy_coef", "entropy", entropy),
    ):
        if getattr(spec, name) and given is None:
            raise ValueError(f"{name} = {getattr(spec, name)!r} needs the column {column!r}")
    index = sequence_ids.long()
    return reference.policy_loss(
        new,
        old,
        advantages.detach().to(new.dtype)[index],
        weights.detach().to(new.dtype)[index],
        ref,
        engine,
        entropy,
        **asdict(spec),
    )


def _check(new: Tensor, columns: dict[str, Tensor | None], sequence_ids: Tensor) -> None:
    if new.dim() != 1 or new.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"new must be fp32 [T], not {new.dtype} {list(new.shape)}")
    for name, column in columns.items():
        if column is not None and (column.shape != new.shape or column.dtype != new.dtype):
            raise ValueError(
                f"{name} must be {new.dtype} {list(new.shape)} like new, "
                f"not {column.dtype} {list(column.shape)}"
            )
    if sequence_ids.shape != new.shape or sequence_ids.dtype.is_floating_point:
        raise ValueError(
            f"sequence_ids must be integers {list(new.shape)}, "
            f"not {sequence_ids.dtype} {list(sequence_ids.shape)}"
        )
