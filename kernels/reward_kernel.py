"""Best of N in one launch: from category codes to rewards, advantages, live groups and counts.

Each program takes whole groups. It computes in float64, as `reference.best_of_n` and the host's
twin do, so that the three agree on what carries a signal. Formulas: `reference.best_of_n`.
"""
# mypy: disallow-untyped-defs=False
# Arguments of Triton functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from speciarl.kernels import codes as ladder
from speciarl.kernels import faults, reference
from speciarl.kernels.launch import on_device_of

TILE = 128
"""Codes of a program of one warp."""

_ABSENT = tl.constexpr(ladder.ABSENT)
_W = tl.constexpr(ladder.W)
_A = tl.constexpr(ladder.A)
_S = tl.constexpr(ladder.S)
_FORMAT = tl.constexpr(ladder.FORMAT)
_CODES = tl.constexpr(len(ladder.CODES))
_EPSILON = tl.constexpr(reference.STD_EPSILON)
_UNKNOWN = tl.constexpr(faults.UNKNOWN_CODE)


@triton.jit
def _standardised(rewards, counted, NORMALIZE: tl.constexpr):
    """`reference.standardise` of [groups, slots] float64."""
    count = tl.sum(counted.to(tl.int32), 1)[:, None]
    lowest = tl.min(tl.where(counted, rewards, float("inf")), 1)[:, None]
    above = tl.where(counted, rewards - tl.where(count > 0, lowest, 0.0), 0.0)
    mean = tl.sum(above, 1)[:, None] / tl.where(count > 1, count, 1).to(tl.float64)
    centred = tl.where(counted, above - mean, 0.0)
    if NORMALIZE:
        degrees = tl.where(count > 2, count - 1, 1).to(tl.float64)
        variance = tl.sum(centred * centred, 1)[:, None] / degrees
        centred = centred / (tl.sqrt(variance) + _EPSILON)
    return centred


@triton.jit(do_not_specialize=["groups", "size"])
def best_of_n_kernel(
    code_ptr,  # [groups, size] int8
    reward_ptr,
    advantage_ptr,
    live_ptr,
    count_ptr,
    fault_ptr,
    groups,
    size,
    VALUES: tl.constexpr,
    FORMAT_PENALTY: tl.constexpr,
    HAS_BAR: tl.constexpr,
    KEEPS_FORMAT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    slot = tl.arange(0, SLOTS)
    inside = (group < groups)[:, None] & (slot < size)[None, :]
    at = group.to(tl.int64)[:, None] * size + slot[None, :]
    code = tl.load(code_ptr + at, mask=inside, other=_ABSENT).to(tl.int32)
    unknown = (code < _ABSENT) | (code > _FORMAT)
    strange = tl.sum(tl.sum(unknown.to(tl.int32), 1), 0)
    if strange > 0:
        tl.atomic_add(fault_ptr + _UNKNOWN, strange, sem="relaxed")
    code = tl.where(unknown, _ABSENT, code)
    judged = (code >= _W) & (code < _FORMAT)
    malformed = code == _FORMAT

    # Constants are made float64 at once: Triton would take them for fp32.
    rewards = tl.zeros([GROUPS, SLOTS], tl.float64)
    penalty = tl.full([GROUPS, SLOTS], FORMAT_PENALTY, tl.float64)
    for known in tl.static_range(_FORMAT):
        rewards = tl.where(
            code == known, tl.full([GROUPS, SLOTS], VALUES[known], tl.float64), rewards
        )
    rewards = tl.where(malformed, penalty, rewards)
    if HAS_BAR:
        best = tl.max(tl.where(judged, code, _W), 1)[:, None]
        bar = tl.minimum(tl.maximum(best, _A), _S)
        rewards = tl.where(judged & (code >= bar), 1.0, rewards)

    counted = judged | malformed if KEEPS_FORMAT else judged
    advantages = _standardised(rewards, counted, NORMALIZE)
    if not KEEPS_FORMAT:
        advantages = tl.where(malformed, penalty, advantages)

    tl.store(reward_ptr + at, rewards.to(tl.float32), mask=inside)
    tl.store(advantage_ptr + at, advantages.to(tl.float32), mask=inside)
    live = tl.max((advantages != 0.0).to(tl.int32), 1)
    tl.store(live_ptr + group, live != 0, mask=group < groups)
    for column in tl.static_range(_CODES):
        count = tl.sum((inside & (code == column + _ABSENT)).to(tl.int32), 1)
        tl.store(count_ptr + group.to(tl.int64) * _CODES + column, count, mask=group < groups)


def launch_shape(size: int) -> tuple[int, int, int]:
    """Groups, slots of a group and warps of a program, for groups of `size` codes."""
    slots = triton.next_power_of_2(size)
    # Half a tile to a warp where there are several: with a whole one, registers spill on 9.0.
    return max(1, TILE // slots), slots, min(16, max(1, 2 * slots // TILE))


def best_of_n(
    codes: Tensor,
    *,
    values: tuple[float, ...],
    has_bar: bool,
    format_penalty: float,
    keeps_format: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.best_of_n` of `codes` [G, N] int8."""
    codes = codes.contiguous()
    groups, size = codes.shape
    rewards = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    advantages = torch.empty_like(rewards)
    live = torch.empty(groups, dtype=torch.bool, device=codes.device)
    counts = torch.empty(groups, len(ladder.CODES), dtype=torch.int32, device=codes.device)
    together, slots, warps = launch_shape(size)
    if groups:
        with on_device_of(codes):
            best_of_n_kernel[(triton.cdiv(groups, together),)](
                codes,
                rewards,
                advantages,
                live,
                counts,
                faults.counters(codes.device),
                groups,
                size,
                VALUES=values,
                FORMAT_PENALTY=format_penalty,
                HAS_BAR=has_bar,
                KEEPS_FORMAT=keeps_format,
                NORMALIZE=normalize,
                GROUPS=together,
                SLOTS=slots,
                num_warps=warps,
            )
    return rewards, advantages, live, counts
