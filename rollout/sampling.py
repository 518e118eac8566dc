"""Choice of the next token from logits, by inverse cumulative distribution in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from speciarl.rollout.engine import Sampling


def choose(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    banned: Tensor,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per sample.

    Args:
        logits: [B, V], any float dtype.
        uniforms: [S] float64 in [0, 1); not read when greedy.
        banned: [K] int64 ids that are never chosen and take no part in the softmax.
        rows: [S] int64, the row of each sample; None: sample i has row i.

    Returns: ids [S] int64 and their log-probs [S] fp32 in nats, log_softmax(logits / temperature)
        (temperature 1 for greedy) over all ids but the banned, not cut by top_p or top_k.
        Logits that are not finite give a log-prob that is not finite.
    """
    masked = logits.float().index_fill(1, banned, -torch.inf)
    greedy = sampling.temperature == 0
    logprobs = (masked if greedy else masked / sampling.temperature).log_softmax(-1)
    if greedy:
        ids = masked.argmax(-1, keepdim=True)
        ids = ids if rows is None else ids.index_select(0, rows)
    else:
        weights = truncate(logprobs.exp(), sampling)
        ids = inverse_cdf(weights, uniforms, rows)
    ids = ids.squeeze(1)
    return ids, logprobs[torch.arange(len(ids), device=ids.device) if rows is None else rows, ids]


def truncate(weights: Tensor, sampling: Sampling) -> Tensor:
    """Zero what top_k, then top_p leave out; tokens as likely as the last kept one stay.

    weights: [R, V] float, not negative. Returns the same shape, not normalised.
    """
    if 0 < sampling.top_k < weights.shape[1]:
        last = weights.topk(sampling.top_k, dim=-1).values[:, -1:]
        weights = weights.where(weights >= last, 0.0)
    if sampling.top_p < 1:
        ordered = weights.sort(dim=-1, descending=True).values
        reached = ordered.cumsum(-1, dtype=torch.float64)
        missing = reached - ordered < sampling.top_p * reached[:, -1:]
        last = ordered.gather(1, missing.sum(-1, keepdim=True).clamp(min=1) - 1)
        weights = weights.where(weights >= last, 0.0)
    return weights


def inverse_cdf(weights: Tensor, uniforms: Tensor, rows: Tensor | None = None) -> Tensor:
    """First id at which the running sum of a row's `weights` exceeds u times their total.

    weights: [B, V] float; uniforms: [S] float64 in [0, 1); rows: [S] or None, as in `choose`.
    Returns [S, 1] int64.

    The sum runs in the order of the vocabulary, not of the probabilities, so a near tie in the
    logits cannot move a sample to a quite different token.
    """
    reached = weights.cumsum(-1, dtype=torch.float64)
    if rows is not None:
        reached = reached.index_select(0, rows)
    target = uniforms[:, None] * reached[:, -1:]
    ids = torch.searchsorted(reached, target, right=True).clamp(max=weights.shape[1] - 1)
    if ids.is_cuda:  # a parallel sum may decrease by a bit: never answer with a token of weight 0
        weights = weights if rows is None else weights.index_select(0, rows)
        ids = ids.where(weights.gather(1, ids) > 0, weights.argmax(-1, keepdim=True))
    return ids
