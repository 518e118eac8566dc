"""Choice of the next token from logits, by inverse cumulative distribution in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from speciarl.rollout.engine import Sampling


def choose(
    logits: Tensor, sampling: Sampling, uniforms: Tensor, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per row.

    Args:
        logits: [R, V], any float dtype.
        uniforms: [R] float64 in [0, 1); not read when greedy.
        banned: [K] int64 ids that are never chosen and take no part in the softmax.

    Returns: ids [R] int64 and their log-probs [R] fp32 in nats, log_softmax(logits / temperature)
        (temperature 1 for greedy) over all ids but the banned, not cut by top_p or top_k.
        A row whose logits are not finite gives a log-prob that is not finite.
    """
    masked = logits.float().index_fill(1, banned, -torch.inf)
    if sampling.temperature == 0:
        logprobs = masked.log_softmax(-1)
        ids = masked.argmax(-1, keepdim=True)
    else:
        logprobs = (masked / sampling.temperature).log_softmax(-1)
        ids = inverse_cdf(truncate(logprobs.exp(), sampling), uniforms)
    return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1)


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


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First id at which the running sum of `weights` exceeds u times their total.

    weights: [R, V] float; uniforms: [R] float64 in [0, 1). Returns [R, 1] int64.

    The sum runs in the order of the vocabulary, not of the probabilities, so a near tie in the
    logits cannot move a sample to a quite different token.
    """
    reached = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * reached[:, -1:]
    ids = torch.searchsorted(reached, target, right=True).clamp(max=weights.shape[1] - 1)
    if ids.is_cuda:  # a parallel sum may decrease by a bit: never answer with a token of weight 0
        ids = ids.where(weights.gather(1, ids) > 0, weights.argmax(-1, keepdim=True))
    return ids
