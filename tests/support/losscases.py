"""Random inputs of the policy loss, and the published formulas one token at a time in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from speciarl.kernels.loss import STATS, LossSpec

COLUMNS = ("new", "old", "ref", "engine", "entropy", "sequence_ids")
"""The inputs that have an entry per token."""


def draw(
    seed: int = 0, tokens: int = 60, sequences: int = 7, *, in_order: bool = True
) -> dict[str, Any]:
    """Arguments of `policy_loss` in float64, of values that fp32 holds; sequence 2 has weight 0."""
    rng = torch.Generator().manual_seed(seed)

    def normal(size: int, scale: float) -> Tensor:
        return (torch.randn(size, generator=rng) * scale).double()

    new = -normal(tokens, 1.0).abs()
    weights = torch.rand(sequences, generator=rng).double()
    weights[2:3] = 0.0
    advantages = normal(sequences, 1.0)
    advantages[:1] = 0.0
    ids = torch.randint(sequences, (tokens,), generator=rng).int()
    return {
        "new": new.requires_grad_(),
        "old": (new.detach() + normal(tokens, 1.2)).float().double(),
        "advantages": advantages,
        "weights": weights,
        "sequence_ids": ids.sort().values if in_order else ids,
        "ref": (new.detach() + normal(tokens, 0.5)).float().double().requires_grad_(),
        "engine": (new.detach() + normal(tokens, 0.5)).float().double(),
        "entropy": normal(tokens, 1.0).abs().requires_grad_(),
    }


def cast(data: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same values, new leaves, in another floating type."""
    return {
        name: value
        if name == "sequence_ids"
        else value.detach().to(dtype).requires_grad_(value.requires_grad)
        for name, value in data.items()
    }


def clipped_loss(ratio: Tensor, adv: float, spec: LossSpec) -> Tensor:
    """PPO's clipped loss with its dual clip, as the papers write it; scalars."""
    unclipped = -adv * ratio
    clipped = -adv * torch.clamp(ratio, 1 - spec.clip_low, 1 + spec.clip_high)
    loss = unclipped if unclipped >= clipped else clipped
    if adv < 0 and spec.dual_clip is not None:
        cap = torch.tensor(-adv * spec.dual_clip, dtype=torch.float64)
        loss = loss if loss <= cap else cap
    return loss


def _ratio(data: dict[str, Any], token: int, spec: LossSpec) -> Tensor:
    new, old = data["new"], data["old"]
    if spec.kind != "gspo":
        return torch.exp(new[token] - old[token])
    own = data["sequence_ids"] == data["sequence_ids"][token]
    sequence = torch.exp((new - old)[own].mean()).detach()
    return sequence * torch.exp(new[token] - new[token].detach())


def token_loss(data: dict[str, Any], token: int, spec: LossSpec) -> Tensor:
    """The loss of one token; a scalar."""
    adv = data["advantages"][data["sequence_ids"][token]].item()
    new, old, ref = data["new"][token], data["old"][token], data["ref"][token]
    ratio = _ratio(data, token, spec)
    if spec.kind == "cispo":
        held = torch.clamp(ratio, 1 - spec.clip_low, 1 + spec.clip_high).detach()
        loss = -adv * held * new
    else:
        loss = clipped_loss(ratio, adv, spec)
    if spec.importance_cap is not None:
        loss = loss * min(math.exp(old - data["engine"][token]), spec.importance_cap)
    gap = ref - new
    kl = {"k1": -gap, "k2": gap**2 / 2, "k3": torch.exp(gap) - gap - 1}[spec.kl]
    return loss + spec.kl_coef * kl - spec.entropy_coef * data["entropy"][token]


def formula(data: dict[str, Any], spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Loss, differentiable, and statistics, by `token_loss` and plain Python."""
    total = torch.zeros((), dtype=torch.float64)
    stats = dict.fromkeys(STATS, 0.0)
    for token, sequence in enumerate(data["sequence_ids"].tolist()):
        adv, weight = data["advantages"][sequence].item(), data["weights"][sequence].item()
        if weight == 0:
            continue
        loss = weight * token_loss(data, token, spec)
        total = total + loss
        gap = (data["ref"][token] - data["new"][token]).item()
        mismatch = (data["old"][token] - data["engine"][token]).item()
        cap, ratio = spec.importance_cap, _ratio(data, token, spec).item()
        always = spec.kind == "cispo"
        stats["tokens"] += 1
        stats["clipped_low"] += (adv < 0 or always) and ratio < 1 - spec.clip_low
        stats["clipped_high"] += (adv > 0 or always) and ratio > 1 + spec.clip_high
        stats["dual_clipped"] += not always and adv < 0 and ratio > (spec.dual_clip or math.inf)
        stats["ratio"] += ratio
        stats["kl_k1"] += -gap
        stats["kl_k3"] += math.exp(gap) - gap - 1
        stats["engine_mismatch"] += abs(mismatch)
        stats["engine_k1"] += -mismatch
        stats["engine_k3"] += math.expm1(mismatch) - mismatch
        stats["engine_weight_squared"] += math.exp(mismatch) ** 2
        stats["importance_weight"] += 1.0 if cap is None else min(math.exp(mismatch), cap)
        stats["entropy"] += data["entropy"][token].item()
        stats["loss"] += loss.item()
        stats["engine_mismatch_max"] = max(stats["engine_mismatch_max"], abs(mismatch))
    return total, torch.tensor(list(stats.values()), dtype=torch.float64)


def gradients(loss: Tensor, data: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of `new`, `ref` and `entropy`, zeros where the loss does not depend on them."""
    if not loss.requires_grad:
        return tuple(torch.zeros_like(data[name]) for name in ("new", "ref", "entropy"))
    carriers = [data[name] for name in ("new", "ref", "entropy")]
    return torch.autograd.grad(loss, carriers, allow_unused=True, materialize_grads=True)
