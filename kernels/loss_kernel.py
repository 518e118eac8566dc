"""The policy loss, its gradients and its statistics from per-token log-probs, in one launch.

Each program takes a block of tokens and writes its sums; the program that finishes last adds them
up in the order of the blocks, so that the same inputs give the same bits. "gspo" needs the mean
log-ratio of every sequence first: a launch of the same build. Formulas: `loss.policy_loss`.
"""
# mypy: disallow-untyped-defs=False
# Arguments of Triton functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from speciarl.kernels import faults, reference
from speciarl.kernels.launch import on_device_of, ticket
from speciarl.kernels.loss import STATS, LossSpec

# One warp a program: its sums need no shared memory, and 32k tokens are a program for each SM.
BLOCK = 256
WARPS = 1
MEAN_BLOCK = 512
MEAN_WARPS = 4

_STATS = tl.constexpr(len(STATS))
_ROW = tl.constexpr(16)  # of the table of sums: a row per program, STATS in front
_ROWS = tl.constexpr(64)  # of that table added up at once
_SEQUENCES = tl.constexpr(16)  # summed at once
_LIMIT = tl.constexpr(reference.LOG_RATIO_LIMIT)
_WEIGHT_LIMIT = tl.constexpr(reference.LOG_WEIGHT_LIMIT)
_OUT_OF_RANGE = tl.constexpr(faults.SEQUENCE_RANGE)


@triton.jit
def _clamped(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _exp_remainder(x):
    """exp(x) - 1 - x to the last bits also around 0, where the terms cancel."""
    series = 1.0 / 5040.0 + x * (1.0 / 40320.0)
    series = 1.0 / 120.0 + x * (1.0 / 720.0 + x * series)
    series = 0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * series))
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def _finished_last(ticket_ptr):
    """Whether all other programs have written their part; then it may be read, past the L1."""
    tl.debug_barrier()  # the atomic is one thread's: it releases what the whole program wrote
    done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    return done == tl.num_programs(0) - 1


@triton.jit
def _token_weights(id_ptr, weight_ptr, offsets, tokens, sequences):
    """Sequence index, weight and liveness of tokens, and how many ids are no sequence's."""
    inside = offsets < tokens
    ids = tl.load(id_ptr + offsets, mask=inside, other=0)
    known = (ids >= 0) & (ids < sequences) & inside
    index = tl.where(known, ids, 0)
    weight = tl.load(weight_ptr + index, mask=known, other=0.0)
    unknown = tl.sum((inside & ~known).to(tl.int32), 0)
    return index, weight, weight != 0.0, unknown


@triton.jit
def _column(ptr, offsets, tokens, live):
    """Tokens of a column, 0 where they weigh nothing, whatever lies there."""
    return tl.where(live, tl.load(ptr + offsets, mask=offsets < tokens, other=0.0), 0.0)


@triton.jit
def _policy_term(
    new, log_ratio, advantage, below, above, dual, KIND: tl.constexpr, USE_DUAL: tl.constexpr
):
    """A token's policy term, its slope in `new`, the ratio, and where each clip holds."""
    ratio = tl.exp(_clamped(log_ratio, -_LIMIT, _LIMIT))
    negative = advantage < 0
    clipped_dual = negative & False
    if KIND == "cispo":
        slope = -advantage * _clamped(ratio, below, above)
        term = slope * new
        clipped_low = ratio < below
        clipped_high = ratio > above
    else:
        clipped_low = negative & (ratio < below)
        clipped_high = (advantage > 0) & (ratio > above)
        held = tl.where(clipped_low, below, tl.where(clipped_high, above, ratio))
        if USE_DUAL:
            clipped_dual = negative & (ratio > dual)
            held = tl.where(clipped_dual, dual, held)
        term = -advantage * held
        flat = clipped_low | clipped_high | clipped_dual | (tl.abs(log_ratio) > _LIMIT)
        slope = tl.where(flat, 0.0, -advantage * ratio)
    return term, slope, ratio, clipped_low, clipped_high, clipped_dual


@triton.jit
def _kl_terms(new, ref, KL: tl.constexpr):
    """The estimator KL and its slope in `new` (zeros for None); k1 and k3 for the statistics."""
    k1 = new - ref
    behind = _clamped(-k1, -_LIMIT, _LIMIT)
    k3 = _exp_remainder(behind)
    value = tl.zeros_like(k1)
    slope = tl.zeros_like(k1)
    if KL == "k1":
        value = k1
        slope += 1.0
    elif KL == "k2":
        value = k1 * k1 * 0.5
        slope = k1
    elif KL == "k3":
        value = k3
        slope = tl.where(tl.abs(k1) > _LIMIT, 0.0, -(k3 + behind))
    return value, slope, k1, k3


@triton.jit
def _weight_terms(log_weight):
    """k1 and k3 of a log-weight, and the weight's square."""
    held = _clamped(log_weight, -_WEIGHT_LIMIT, _WEIGHT_LIMIT)
    return -held, _exp_remainder(held), tl.exp(2.0 * held)


@triton.jit
def _importance(log_importance, cap):
    """min(exp(log_importance), cap)."""
    # exp(88) is finite in fp32: nothing but the cap is seen of what lies beyond.
    importance = tl.exp(tl.where(log_importance > 88.0, 88.0, log_importance))
    return tl.where(importance > cap, cap, importance)


@triton.jit
def _add_up(partial_ptr, loss_ptr, stats_ptr):
    """The programs' sums, in their order."""
    column = tl.arange(0, _ROW)
    sums = tl.zeros([_ROWS, _ROW], tl.float32)
    most = tl.zeros([_ROWS, _ROW], tl.float32)
    for top in range(0, tl.num_programs(0), _ROWS):
        block = top + tl.arange(0, _ROWS)
        at = partial_ptr + block[:, None] * _ROW + column[None, :]
        mask = (block < tl.num_programs(0))[:, None] & (column < _STATS)[None, :]
        part = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        sums += part
        most = tl.maximum(most, part)
    total = tl.where(column == _STATS - 1, tl.max(most, 0), tl.sum(sums, 0))
    tl.store(stats_ptr + column, total, mask=column < _STATS)
    tl.store(loss_ptr + column * 0, total, mask=column == _STATS - 2)


@triton.jit(do_not_specialize=["tokens", "sequences"])
def sequence_means_kernel(
    new_ptr,
    old_ptr,
    weight_ptr,
    id_ptr,
    partial_ptr,  # [programs, 2, sequences]: sums and counts, where the block has such tokens
    bounds_ptr,  # [programs, 2]: which sequences those are, from and up to
    mean_ptr,
    ticket_ptr,
    tokens,
    sequences,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    index, _, live, _ = _token_weights(id_ptr, weight_ptr, offsets, tokens, sequences)
    new = _column(new_ptr, offsets, tokens, live)
    log_ratio = new - _column(old_ptr, offsets, tokens, live)
    first = tl.min(tl.where(live, index, sequences), 0).to(tl.int32) // _SEQUENCES * _SEQUENCES
    stop = tl.max(tl.where(live, index, -1), 0).to(tl.int32) + 1
    tl.store(bounds_ptr + program * 2, first)
    tl.store(bounds_ptr + program * 2 + 1, stop)
    row = partial_ptr + program.to(tl.int64) * 2 * sequences
    for start in range(first, stop, _SEQUENCES):
        own = start + tl.arange(0, _SEQUENCES)
        hit = (index[None, :] == own[:, None]) & live[None, :]
        sums = tl.sum(tl.where(hit, log_ratio[None, :], 0.0), 1)
        tl.store(row + own, sums, mask=own < sequences)
        tl.store(row + sequences + own, tl.sum(hit.to(tl.float32), 1), mask=own < sequences)

    if _finished_last(ticket_ptr):
        for start in range(0, sequences, _SEQUENCES):
            own = start + tl.arange(0, _SEQUENCES)
            sums = tl.zeros([_ROWS, _SEQUENCES], tl.float32)
            counts = tl.zeros([_ROWS, _SEQUENCES], tl.float32)
            for top in range(0, tl.num_programs(0), _ROWS):
                block = top + tl.arange(0, _ROWS)
                there = block < tl.num_programs(0)
                low = tl.load(bounds_ptr + block * 2, mask=there, other=0, cache_modifier=".cg")
                high = tl.load(
                    bounds_ptr + block * 2 + 1, mask=there, other=0, cache_modifier=".cg"
                )
                written = (start >= low) & (start < high)
                mask = written[:, None] & (own < sequences)[None, :]
                at = partial_ptr + block.to(tl.int64)[:, None] * 2 * sequences + own[None, :]
                sums += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
                counts += tl.load(at + sequences, mask=mask, other=0.0, cache_modifier=".cg")
            count = tl.sum(counts, 0)
            mean = tl.sum(sums, 0) / tl.where(count > 0, count, 1.0)
            tl.store(mean_ptr + own, mean, mask=own < sequences)
        tl.store(ticket_ptr, 0)


@triton.jit(do_not_specialize=["tokens", "sequences"])
def policy_loss_kernel(
    new_ptr,
    old_ptr,
    advantage_ptr,
    weight_ptr,
    id_ptr,
    ref_ptr,  # this and the next three may be None
    engine_ptr,
    entropy_ptr,
    mean_ptr,
    d_new_ptr,
    d_ref_ptr,  # this and the next may be None
    d_entropy_ptr,
    partial_ptr,  # [programs, _ROW]
    loss_ptr,
    stats_ptr,
    ticket_ptr,
    fault_ptr,
    tokens,
    sequences,
    below,
    above,
    dual,
    kl_coef,
    cap,
    entropy_coef,
    KIND: tl.constexpr,
    KL: tl.constexpr,  # None where the loss has no such term
    USE_DUAL: tl.constexpr,
    USE_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tokens
    index, weight, live, unknown = _token_weights(id_ptr, weight_ptr, offsets, tokens, sequences)
    if unknown > 0:
        tl.atomic_add(fault_ptr + _OUT_OF_RANGE, unknown, sem="relaxed")
    new = _column(new_ptr, offsets, tokens, live)
    old = _column(old_ptr, offsets, tokens, live)
    advantage = tl.load(advantage_ptr + index, mask=live, other=0.0)
    log_ratio = new - old
    if KIND == "gspo":
        log_ratio = tl.load(mean_ptr + index, mask=live, other=0.0)
    term, slope, ratio, clipped_low, clipped_high, clipped_dual = _policy_term(
        new, log_ratio, advantage, below, above, dual, KIND, USE_DUAL
    )
    gap = tl.zeros_like(new)
    engine_k1 = gap
    engine_k3 = gap
    squared = gap
    importance = gap + 1.0
    if engine_ptr is not None:
        log_importance = old - _column(engine_ptr, offsets, tokens, live)
        gap = tl.abs(log_importance)
        engine_k1, engine_k3, squared = _weight_terms(log_importance)
        if USE_CAP:
            importance = _importance(log_importance, cap)
            term *= importance
            slope *= importance
    k1 = tl.zeros_like(new)
    k3 = k1
    if ref_ptr is not None:
        ref = _column(ref_ptr, offsets, tokens, live)
        kl, kl_slope, k1, k3 = _kl_terms(new, ref, KL)
        term += kl_coef * kl
        slope += kl_coef * kl_slope
        if d_ref_ptr is not None:
            tl.store(d_ref_ptr + offsets, -weight * kl_coef * kl_slope, mask=inside)
    entropy = tl.zeros_like(new)
    if entropy_ptr is not None:
        entropy = _column(entropy_ptr, offsets, tokens, live)
        term -= entropy_coef * entropy
        if d_entropy_ptr is not None:
            tl.store(d_entropy_ptr + offsets, -entropy_coef * weight, mask=inside)
    tl.store(d_new_ptr + offsets, weight * slope, mask=inside)

    # The order of STATS.
    row = partial_ptr + program * _ROW
    tl.store(row + 0, tl.sum(live.to(tl.float32), 0))
    tl.store(row + 1, tl.sum((clipped_low & live).to(tl.float32), 0))
    tl.store(row + 2, tl.sum((clipped_high & live).to(tl.float32), 0))
    tl.store(row + 3, tl.sum((clipped_dual & live).to(tl.float32), 0))
    tl.store(row + 4, tl.sum(tl.where(live, ratio, 0.0), 0))
    tl.store(row + 5, tl.sum(k1, 0))
    tl.store(row + 6, tl.sum(k3, 0))
    tl.store(row + 7, tl.sum(gap, 0))
    tl.store(row + 8, tl.sum(engine_k1, 0))
    tl.store(row + 9, tl.sum(engine_k3, 0))
    tl.store(row + 10, tl.sum(tl.where(live, squared, 0.0), 0))
    tl.store(row + 11, tl.sum(tl.where(live, importance, 0.0), 0))
    tl.store(row + 12, tl.sum(entropy, 0))
    tl.store(row + 13, tl.sum(weight * term, 0))
    tl.store(row + 14, tl.max(gap, 0))

    if _finished_last(ticket_ptr):
        _add_up(partial_ptr, loss_ptr, stats_ptr)
        tl.store(ticket_ptr, 0)


def launch(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    sequence_ids: Tensor,
    ref: Tensor | None,
    engine: Tensor | None,
    entropy: Tensor | None,
    wants_ref: bool,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, statistics, d loss / d new, ref, entropy; checked arguments of `loss`, fp32 columns."""
    new, old, sequence_ids = new.contiguous(), old.contiguous(), sequence_ids.contiguous()
    advantages, weights = advantages.float().contiguous(), weights.float().contiguous()
    ref, engine, entropy = (
        None if column is None else column.contiguous() for column in (ref, engine, entropy)
    )
    tokens, sequences = len(new), len(weights)
    uses_kl = ref is not None and spec.kl_coef != 0
    uses_entropy = entropy is not None and spec.entropy_coef != 0
    programs = max(1, triton.cdiv(tokens, BLOCK))
    d_new = torch.empty_like(new)
    d_ref = torch.empty_like(new) if wants_ref else None
    d_entropy = torch.empty_like(new) if uses_entropy else None
    partials = new.new_empty(programs, _ROW.value)
    loss, stats = new.new_empty(()), new.new_empty(len(STATS))
    with on_device_of(new):
        means = None
        if spec.kind == "gspo":
            means = _sequence_means(new, old, weights, sequence_ids)
        policy_loss_kernel[(programs,)](
            new,
            old,
            advantages,
            weights,
            sequence_ids,
            ref,
            engine,
            entropy,
            means,
            d_new,
            d_ref,
            d_entropy,
            partials,
            loss,
            stats,
            ticket(new.device),
            faults.counters(new.device),
            tokens,
            sequences,
            1.0 - spec.clip_low,
            1.0 + spec.clip_high,
            float(spec.dual_clip or 0.0),
            float(spec.kl_coef),
            float(spec.importance_cap or 0.0),
            float(spec.entropy_coef),
            KIND=spec.kind,
            KL=spec.kl if uses_kl else None,
            USE_DUAL=spec.dual_clip is not None,
            USE_CAP=spec.importance_cap is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return loss, stats, d_new, d_ref, d_entropy


def _sequence_means(new: Tensor, old: Tensor, weights: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean of new - old over the tokens of each sequence, [S]; 0 for one of weight 0."""
    programs = max(1, triton.cdiv(len(new), MEAN_BLOCK))
    means = new.new_empty(len(weights))
    sequence_means_kernel[(programs,)](
        new,
        old,
        weights,
        sequence_ids,
        new.new_empty(programs, 2, len(weights)),
        torch.empty(programs, 2, dtype=torch.int32, device=new.device),
        means,
        ticket(new.device),
        len(new),
        len(weights),
        BLOCK=MEAN_BLOCK,
        num_warps=MEAN_WARPS,
    )
    return means
