"""The formulas of this folder in plain torch: the oracle of every kernel, and the CPU's route.

Nothing here reads a device value on the host, so the functions also run on a GPU without a
synchronisation.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from speciarl.kernels.codes import ABSENT, CODES, FORMAT, A, S, W

STD_EPSILON = 1e-6
LOG_RATIO_LIMIT = 60.0
"""Nats. exp(60) is finite in fp32; log-ratios beyond it are treated as this large."""


# --- linear log-prob ---------------------------------------------------------------------------


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if either input is, else float32."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    banned: Tensor | None,
    temperature: float,
    with_entropy: bool,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `targets` [T] under `hidden` [T, H] @ `weight` [V, H]^T / temperature.

    Returns log-probs [T] and entropies [T] or None, in nats, in `compute_dtype`.
    """
    dtype = compute_dtype(hidden, weight)
    logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    entropy = torch.empty_like(logp) if with_entropy else None
    table = torch.empty(0, dtype=dtype, device=hidden.device)
    for rows, logits in _logits(hidden, weight.to(dtype), banned, temperature, chunk):
        table = _room(table, logits)
        torch.log_softmax(logits, dim=1, out=table)
        logp[rows] = table.gather(1, targets[rows, None]).squeeze(1)
        if entropy is not None:
            probs = torch.exp(table, out=logits)
            _fill(table, banned, 0.0)  # 0 * -inf is not 0
            entropy[rows] = table.mul_(probs).sum(dim=1).neg_()
    return logp, entropy


def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    banned: Tensor | None,
    temperature: float,
    chunk: int,
    *,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `hidden` and `weight`, each None where not needed, in their own dtypes.

    With p = softmax(z): d logp / dz = onehot - p and d entropy / dz = -p (ln p + entropy). The
    weight's gradient is summed over the chunks in `compute_dtype`.
    """
    dtype = compute_dtype(hidden, weight)
    matrix = weight.to(dtype)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(matrix) if need_weight else None
    table = torch.empty(0, dtype=dtype, device=hidden.device)
    for rows, logits in _logits(hidden, matrix, banned, temperature, chunk):
        table = _room(table, logits)
        if entropy is not None and grad_entropy is not None:
            torch.log_softmax(logits, dim=1, out=table)
            probs = torch.exp(table, out=logits)
            _fill(table, banned, 0.0)
            table.add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
            if grad_logp is not None:
                table.add_(grad_logp[rows, None])
            grad = table.mul_(probs).neg_()
        else:
            assert grad_logp is not None
            grad = torch.softmax(logits, dim=1, out=table).mul_(-grad_logp[rows, None])
        if grad_logp is not None:
            grad.scatter_add_(1, targets[rows, None], grad_logp[rows, None])
        _fill(grad, banned, 0.0)  # a banned target has no gradient of its own
        if temperature != 1.0:
            grad.div_(temperature)
        if grad_hidden is not None:
            grad_hidden[rows] = (grad @ matrix).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(grad.t(), hidden[rows].to(dtype))
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _logits(
    hidden: Tensor, matrix: Tensor, banned: Tensor | None, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Row slices and their logits [rows, V]; every slice overwrites the memory of the last."""
    buffer = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        states = hidden[rows].to(matrix.dtype)
        if temperature != 1.0:
            states = states / temperature
        if len(buffer) != len(states):
            buffer = matrix.new_empty(len(states), len(matrix))
        torch.mm(states, matrix.t(), out=buffer)
        _fill(buffer, banned, float("-inf"))
        yield rows, buffer


def _room(table: Tensor, like: Tensor) -> Tensor:
    return table if table.shape == like.shape else torch.empty_like(like)


def _fill(table: Tensor, columns: Tensor | None, value: float) -> None:
    if columns is not None:
        table.index_fill_(1, columns, value)


# --- policy loss -------------------------------------------------------------------------------


def kl_estimate(kind: str, new: Tensor, ref: Tensor) -> Tensor:
    """Per-token KL(new || ref) from samples of `new` (Schulman, "Approximating KL divergence").

    k1 = new - ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1.
    """
    if kind == "k1":
        return new - ref
    if kind == "k2":
        return (new - ref).square() / 2
    gap = (ref - new).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(gap) - gap


def policy_loss(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    weight: Tensor,
    ref: Tensor | None,
    engine: Tensor | None,
    entropy: Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl: str,
    kl_coef: float,
    importance_cap: float | None,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the per-token losses and the statistics of `loss.STATS`; all inputs are [T].

    min(ratio A, clip(ratio) A), and its dual clip for A < 0, are written as one clamp of the
    ratio, which leaves no ties between branches: for A >= 0 only the upper clip can bind, for
    A < 0 only the lower one and dual_clip.
    """
    old = old.detach()
    negative = advantage < 0
    ratio = (new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    above, below = 1.0 + clip_high, 1.0 - clip_low
    bounded = torch.where(negative, ratio.clamp(min=below, max=dual_clip), ratio.clamp(max=above))
    token_loss = -advantage * bounded
    importance = torch.ones_like(ratio)
    if engine is not None and importance_cap is not None:
        importance = (old - engine.detach()).exp().clamp(max=importance_cap)
        token_loss = token_loss * importance
    if ref is not None and kl_coef != 0:
        token_loss = token_loss + kl_coef * kl_estimate(kl, new, ref)
    if entropy is not None and entropy_coef != 0:
        token_loss = token_loss - entropy_coef * entropy
    loss = (weight * token_loss).sum()

    with torch.no_grad():
        live = weight != 0
        zero = torch.zeros_like(ratio)
        gap = zero if engine is None else (old - engine).abs() * live
        dual = zero if dual_clip is None else negative & (ratio > dual_clip)
        columns = (
            torch.ones_like(ratio),
            negative & (ratio < below),
            (advantage > 0) & (ratio > above),
            dual,
            ratio,
            zero if ref is None else kl_estimate("k1", new, ref),
            zero if ref is None else kl_estimate("k3", new, ref),
            gap,
            importance,
            zero if entropy is None else entropy,
        )
        sums = [(column * live).sum(dtype=ratio.dtype) for column in columns]
        largest = torch.cat((gap, gap.new_zeros(1))).amax()
        stats = torch.stack((*sums, loss.detach(), largest))
    return loss, stats


# --- best of N ---------------------------------------------------------------------------------


def best_of_n(
    codes: Tensor,
    *,
    values: Sequence[float],
    has_bar: bool,
    format_penalty: float,
    keeps_format: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, advantages [G, N] fp32, live [G] bool, counts [G, 8] int32 of `codes` [G, N] int8.

    `values`, `has_bar` and `keeps_format` are the properties of `reward.RewardSpec`.
    """
    judged = (codes >= W) & (codes < FORMAT)
    malformed = codes == FORMAT
    rewards = torch.zeros(codes.shape, dtype=torch.float64, device=codes.device)
    for code, value in enumerate(values):
        rewards.masked_fill_(codes == code, value)
    rewards.masked_fill_(malformed, format_penalty)
    if has_bar:
        best = codes.masked_fill(~judged, W).amax(dim=1, keepdim=True)
        rewards.masked_fill_(judged & (codes >= best.clamp(A, S)), 1.0)

    advantages = standardise(rewards, (codes != ABSENT) if keeps_format else judged, normalize)
    if not keeps_format:
        advantages.masked_fill_(malformed, format_penalty)
    counts = torch.stack([(codes == code).sum(dim=1, dtype=torch.int32) for code in CODES], dim=1)
    return rewards.float(), advantages.float(), (advantages != 0).any(dim=1), counts


def standardise(rewards: Tensor, counted: Tensor, normalize: bool) -> Tensor:
    """(r - mean) / (std + 1e-6) over the counted entries of each row, 0 elsewhere; [G, N].

    Rewards are first measured from the row's lowest, which changes nothing but the rounding: a
    constant row gives exactly 0, and the lowest reward is never rounded above the mean.
    """
    count = counted.sum(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~counted, torch.inf).amin(dim=1, keepdim=True)
    above = (rewards - lowest).masked_fill(~counted, 0.0)
    mean = above.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (above - mean).masked_fill(~counted, 0.0)
    if not normalize:
        return centred
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + STD_EPSILON)
