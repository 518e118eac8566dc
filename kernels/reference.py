"""The formulas of this folder in plain torch: the oracle of every kernel, and the CPU's route.

Nothing here reads a device value on the host, so the functions also run on a GPU without a
synchronisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speciarl.kernels import faults
from speciarl.kernels.codes import ABSENT, CODES, FORMAT, A, S, W

STD_EPSILON = 1e-6
LOG_RATIO_LIMIT = 60.0
"""Nats. exp(60) is finite in fp32; log-ratios beyond it are treated as this large."""
LOG_WEIGHT_LIMIT = LOG_RATIO_LIMIT / 2
"""Nats. The same for weights whose squares are summed."""


# --- linear log-prob ---------------------------------------------------------------------------
#
# With z = hidden . weight / temperature, a row's anchor a = max z and E[v] = exp(z[v] - a):
#   gap = z[y] - a, others = sum of E[v], moment = sum of E[v] ln E[v], both over v != y;
#   S = others + exp(gap), p = E / S, ln p[y] = -ln(1 + others / exp(gap)): exact where p[y] -> 1;
#   entropy = ln S - (moment + exp(gap) gap) / S.
# d ln p[y] / dz = onehot(y) - p and d entropy / dz = -p (ln p + entropy).

SHIFT_LIMIT = 60.0
"""Nats. A shard of the vocabulary whose logits all lie this far below the row's maximum counts as
if they lay here: its probabilities are below 1e-26 either way, and no factor overflows."""


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 if either input is, else float32."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def fill_logits(
    table: Tensor, hidden: Tensor, matrix: Tensor, allowed: Tensor | None, temperature: float
) -> None:
    """Writes the logits of `hidden` [C, H] under `matrix` [V, H] to `table` [C, V], -inf where
    not `allowed` [V]; products in the matrix's dtype."""
    states = hidden.to(matrix.dtype)
    torch.mm(states if temperature == 1.0 else states / temperature, matrix.t(), out=table)
    if allowed is not None:
        table.masked_fill_(~allowed, float("-inf"))


def row_sums(table: Tensor, columns: Tensor, with_entropy: bool) -> Tensor:
    """(a, z[y], others, moment), stacked [4, C], of logits [C, V], which become E, 0 at y.

    columns [C]: y, or -1 where the target is not among these columns (z[y] is then -inf).
    """
    anchor = table.amax(1).clamp(min=torch.finfo(table.dtype).min)
    inside, at = columns >= 0, columns.clamp(min=0)[:, None]
    target = table.gather(1, at)[:, 0].where(inside, float("-inf"))
    table.sub_(anchor[:, None]).exp_()
    put(table, columns, torch.zeros_like(anchor))
    moment = torch.xlogy(table, table).sum(1) if with_entropy else torch.zeros_like(anchor)
    return torch.stack((anchor, target, table.sum(1), moment))


def put(table: Tensor, columns: Tensor, values: Tensor) -> None:
    """table[r, columns[r]] = values[r] for every row r whose column is not -1."""
    at = columns.clamp(min=0)[:, None]
    values = values[:, None].to(table.dtype)
    table.scatter_(1, at, values.where(columns[:, None] >= 0, table.gather(1, at)))


def settle(sums: Tensor) -> Tensor:
    """(a, gap, others, moment, shift) [5, T] from `row_sums` over the whole vocabulary.

    shift: how far the row's anchor lies above that of the table, here 0 (see `shards`).
    """
    anchor, target, others, moment = sums
    return torch.stack((anchor, target - anchor, others, moment, torch.zeros_like(anchor)))


def finish(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] in nats from settled sums; -inf where the target has no logit."""
    _, gap, others, moment, _ = sums
    logp = -torch.logaddexp(others.log() - gap, torch.zeros_like(gap))
    target = gap.exp()
    log_total = torch.where(gap.isneginf(), others.log(), gap - logp)
    return logp, log_total - (moment + torch.xlogy(target, target)) / (others + target)


def at_target(sums: Tensor) -> Tensor:
    """What the table holds at the target's column, so that E / S there is p - 1; [C]."""
    _, _, others, _, shift = sums
    return -others / shift.exp()


def gradient(
    table: Tensor,
    columns: Tensor,
    sums: Tensor,
    temperature: float,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Turns E [C, V], with `at_target` in place, into a table whose rows, times the factors [C]
    returned, are dL/d(hidden . weight), for upstream gradients [C] of log-prob and entropy (0 where
    the log-prob is -inf). Without the latter the table is right as it is."""
    _, gap, others, _, shift = sums
    if grad_entropy is None:
        return -grad_logp * shift.exp() / (others + gap.exp()) / temperature
    scale, g, h, value = entropy_coefficients(sums, grad_logp, grad_entropy)
    plogp = torch.xlogy(table.mul_(scale[:, None]), table)
    table.mul_(g[:, None]).add_(plogp.mul_(h[:, None]))
    put(table, columns, value)
    return torch.full_like(gap, -1.0 / temperature)


def entropy_coefficients(sums: Tensor, grad_logp: Tensor, grad_entropy: Tensor) -> Tensor:
    """(p / E, g, h, value at the target's column), stacked [4, C]: -dL/dz is g p + h p ln p
    elsewhere."""
    _, gap, others, _, shift = sums
    logp, entropy = finish(sums)
    target = gap.exp()
    total = others + target
    logp = logp.clamp(min=torch.finfo(gap.dtype).min)  # 0 * -inf is not 0
    value = grad_entropy * target / total * (logp + entropy) - grad_logp * others / total
    g = grad_logp + grad_entropy * entropy
    return torch.stack((shift.exp() / total, g, grad_entropy, value))


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


def engine_terms(old: Tensor, engine: Tensor) -> Tensor:
    """|old - engine|, k1, k3 and the squared weight of `loss.STATS`, stacked [4, T] in float64:
    in fp32 the terms of k3 cancel to nothing where the two hardly differ."""
    apart = old.double() - engine.double()
    held = apart.clamp(-LOG_WEIGHT_LIMIT, LOG_WEIGHT_LIMIT)
    return torch.stack((apart.abs(), -held, torch.expm1(held) - held, (2 * held).exp()))


def policy_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    ref: Tensor | None,
    engine: Tensor | None,
    entropy: Tensor | None,
    *,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl: str,
    kl_coef: float,
    importance_cap: float | None,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the per-token losses and the statistics of `loss.STATS`.

    new, old, ref, engine, entropy [T]; advantages, weights [S]; sequence_ids [T], of which those
    outside [0, S) are counted as faults and weigh nothing. Differentiable by autograd.
    """
    index, weight = _spread(weights.detach().to(new.dtype), sequence_ids)
    live = weight != 0
    advantage = advantages.detach().to(new.dtype).index_select(0, index).where(live, 0.0)
    # What weighs nothing may hold anything, infinities too.
    new, old = new.where(live, 0.0), old.detach().where(live, 0.0)
    ref = None if ref is None else ref.where(live, 0.0)
    engine = None if engine is None else engine.detach().where(live, 0.0)
    entropy = None if entropy is None else entropy.where(live, 0.0)

    log_ratio = new - old
    if kind == "gspo":
        mean = _sequence_means(log_ratio.detach(), live, index, len(weights))
        log_ratio = log_ratio - log_ratio.detach() + mean
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    above, below = 1.0 + clip_high, 1.0 - clip_low
    negative, positive = advantage < 0, advantage > 0
    if kind == "cispo":
        token_loss = -advantage * ratio.detach().clamp(below, above) * new
        low, high, dual_clip = ratio < below, ratio > above, None
    else:
        # min(ratio A, clip(ratio) A), and its dual clip for A < 0, as one clamp of the ratio: no
        # ties between branches. For A >= 0 only the upper clip can bind, for A < 0 the others.
        held = ratio.clamp(min=below, max=dual_clip).where(negative, ratio.clamp(max=above))
        token_loss = -advantage * held
        low, high = negative & (ratio < below), positive & (ratio > above)

    importance = torch.ones_like(ratio)
    if engine is not None and importance_cap is not None:
        importance = (old - engine).exp().clamp(max=importance_cap)
        token_loss = token_loss * importance
    if ref is not None and kl_coef != 0:
        token_loss = token_loss + kl_coef * kl_estimate(kl, new, ref)
    if entropy is not None and entropy_coef != 0:
        token_loss = token_loss - entropy_coef * entropy
    loss = (weight * token_loss).sum()

    with torch.no_grad():
        zero = torch.zeros_like(ratio)
        apart = zero.expand(4, -1) if engine is None else engine_terms(old, engine)
        columns = (
            torch.ones_like(ratio),
            low,
            high,
            zero if dual_clip is None else negative & (ratio > dual_clip),
            ratio,
            zero if ref is None else kl_estimate("k1", new, ref),
            zero if ref is None else kl_estimate("k3", new, ref),
            *apart,
            importance,
            zero if entropy is None else entropy,
        )
        sums = [(column * live).sum(dtype=ratio.dtype) for column in columns]
        largest = torch.cat((apart[0], zero.new_zeros(1))).amax().to(ratio.dtype)
        stats = torch.stack((*sums, loss.detach(), largest))
    return loss, stats


def _spread(weights: Tensor, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [T] into the sequences, and the tokens' weights, 0 where the id is no sequence's."""
    ids = sequence_ids.long()
    known = (ids >= 0) & (ids < len(weights))
    faults.count(faults.SEQUENCE_RANGE, ~known)
    index = ids.where(known, 0)
    return index, weights.index_select(0, index).where(known, 0.0)


def _sequence_means(values: Tensor, live: Tensor, index: Tensor, sequences: int) -> Tensor:
    """For each token the mean of `values` over the live tokens of its sequence; [T]."""
    sums = torch.zeros(2, sequences, dtype=torch.float64, device=values.device)
    sums.index_add_(1, index, torch.stack((values * live, live)).double())
    return (sums[0] / sums[1].clamp(min=1)).to(values.dtype).index_select(0, index)


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

    `values`, `has_bar` and `keeps_format` are the properties of `reward.RewardSpec`. An unknown
    code counts as ABSENT, and as a fault.
    """
    unknown = (codes < ABSENT) | (codes > FORMAT)
    faults.count(faults.UNKNOWN_CODE, unknown)
    codes = codes.masked_fill(unknown, ABSENT)
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
