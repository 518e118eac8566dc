"""From the category codes of a group of rollouts to rewards and advantages.

`best_of_n` runs on the device that holds the codes; `best_of_n_numpy` is the same rule for the
host, which needs it before the upload to decide which groups have signal.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from speciarl.kernels import faults, reference
from speciarl.kernels.codes import ABSENT, CODES, FORMAT, A, S, W
from speciarl.kernels.launch import use_triton

Array = TypeVar("Array")

# Rewards of W, A, G, S-, S, S+ (SpeciaRL, the static baselines of its ablation).
_STATIC: dict[str, tuple[float, ...]] = {
    "static-binary": (0.0, 0.0, 0.0, 0.0, 1.0, 1.0),
    "static-graded-1": (0.0, 0.25, 0.5, 0.75, 1.0, 1.0),
    "static-graded-2": (0.0, 0.0, 0.5, 0.75, 1.0, 1.0),
    "static-graded-3": (0.0, 0.0, 0.0, 0.75, 1.0, 1.0),
}
_DYNAMIC = ("speciarl", "speciarl-guarded", "speciarl-ordered")
_PUBLISHED = "-published"

RULES: tuple[str, ...] = (
    *_DYNAMIC,
    *_STATIC,
    *(name + _PUBLISHED for name in _STATIC),
    "table",
)


@dataclass(frozen=True)
class RewardSpec:
    """Which reward a category earns within its group.

    Dynamic rules compare with the bar c* = the best judged category of the group, held between
    A and S (SpeciaRL, section 3). `speciarl` is the published rule: 1 at or above the bar, else 0,
    with format failures in the group's mean and deviation, so that a wrong answer can gain from
    another rollout's format failure. `speciarl-guarded` leaves them out. `speciarl-ordered` also
    tells a wrong answer (-wrong_penalty) from a correct one below the bar (0); an abstention that
    reaches the bar (nothing better was sampled) earns 1, as in the other two. The last two are
    this project's.

    Static rules pay a fixed value per category and leave format failures out of the statistics;
    with the suffix `-published` they are kept in. `table` is a static rule with values of its own.
    """

    rule: str = "speciarl-ordered"
    """One of RULES."""
    format_penalty: float = -1.0
    """Reward of a format failure, and its advantage where the rule leaves it out; at most 0."""
    wrong_penalty: float = 0.5
    """What a wrong answer costs under `speciarl-ordered`; at least 0."""
    table: tuple[float, ...] | None = None
    """Rewards of W, A, G, S-, S, S+ for the rule `table`; W's must be the smallest."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            near = difflib.get_close_matches(str(self.rule), RULES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"reward rule = {self.rule!r} is unknown; nearest: {near!r}; known: "
                + ", ".join(RULES)
            )
        if not (math.isfinite(self.format_penalty) and self.format_penalty <= 0):
            raise ValueError(f"format_penalty = {self.format_penalty!r} must be finite and <= 0")
        if not (math.isfinite(self.wrong_penalty) and self.wrong_penalty >= 0):
            raise ValueError(f"wrong_penalty = {self.wrong_penalty!r} must be finite and >= 0")
        if (self.rule == "table") != (self.table is not None):
            raise ValueError(f"table = {self.table!r} does not go with rule = {self.rule!r}")
        if self.table is not None:
            _check_table(self.table)

    @property
    def values(self) -> tuple[float, ...]:
        """Rewards of W, A, G, S-, S, S+ where no bar is reached."""
        if self.table is not None:
            return tuple(float(value) for value in self.table)
        if self.rule == "speciarl-ordered":
            return (-self.wrong_penalty, 0.0, 0.0, 0.0, 0.0, 0.0)
        return _STATIC.get(self.rule.removesuffix(_PUBLISHED), (0.0,) * 6)

    @property
    def has_bar(self) -> bool:
        """Whether a category at or above the group's bar earns 1."""
        return self.rule in _DYNAMIC

    @property
    def keeps_format(self) -> bool:
        """Whether format failures enter the group's mean and deviation."""
        return self.rule == "speciarl" or self.rule.endswith(_PUBLISHED)


def _check_table(table: tuple[float, ...]) -> None:
    if len(table) != 6:
        raise ValueError(f"table = {table!r} needs 6 values (W, A, G, S-, S, S+)")
    if not all(math.isfinite(value) for value in table):
        raise ValueError(f"table = {table!r} must be finite")
    if table[W] > min(table):
        raise ValueError(
            f"table = {table!r}: a wrong answer (the first value) must not earn more than another"
        )


class GroupResult(NamedTuple, Generic[Array]):
    """What G groups of N rollouts earned; tensors on the device, arrays on the host.

    rewards, advantages: [G, N] fp32, 0 where ABSENT. live: [G] bool, some advantage is not 0.
    counts: [G, 8] int32, column c + 1 counts the code c.
    """

    rewards: Array
    advantages: Array
    live: Array
    counts: Array


def best_of_n(
    codes: Tensor, rule: RewardSpec, *, normalize: bool, route: str = "auto"
) -> GroupResult[Tensor]:
    """Rewards and group advantages of `codes` [G, N] int8, without a host synchronisation.

    Advantages are (r - mean) / (std + 1e-6) over the group's scored rollouts (unbiased std), or
    r - mean where `normalize` is off (Dr.GRPO); 0 where fewer than two rollouts count. Values are
    computed in float64. route: "reference", "triton" (one launch), or "auto": triton on CUDA.

    Raises ValueError if `codes` is not int8 [G, N] with N >= 1, for a route that cannot run, and
    for an unknown code (on a device it is counted, see `kernels.faults`, and taken as ABSENT).
    """
    _check_codes(codes.dtype == torch.int8, str(codes.dtype), tuple(codes.shape))
    faults.check_range("codes", codes, ABSENT, FORMAT + 1)
    if use_triton(route, codes.device):
        from speciarl.kernels import reward_kernel

        implementation = reward_kernel.best_of_n
    else:
        implementation = reference.best_of_n
    return GroupResult(
        *implementation(
            codes,
            values=rule.values,
            has_bar=rule.has_bar,
            format_penalty=rule.format_penalty,
            keeps_format=rule.keeps_format,
            normalize=normalize,
        )
    )


def best_of_n_numpy(
    codes: np.ndarray, rule: RewardSpec, *, normalize: bool
) -> GroupResult[np.ndarray]:
    """`best_of_n` for arrays on the host.

    Raises ValueError if `codes` is not int8 [G, N] with N >= 1, or holds an unknown code.
    """
    _check_codes(codes.dtype == np.int8, str(codes.dtype), codes.shape)
    if ((codes < ABSENT) | (codes > FORMAT)).any():
        unknown = sorted(set(codes.ravel().tolist()) - set(CODES))
        raise ValueError(f"codes holds {unknown}; known: {CODES}")
    judged = (codes >= W) & (codes < FORMAT)
    rewards = np.zeros(codes.shape)
    for code, value in enumerate(rule.values):
        rewards[codes == code] = value
    rewards[codes == FORMAT] = rule.format_penalty
    if rule.has_bar:
        best = np.where(judged, codes, W).max(axis=1, keepdims=True)
        rewards[judged & (codes >= best.clip(A, S))] = 1.0

    counted = (codes != ABSENT) if rule.keeps_format else judged
    advantages = _standardise(rewards, counted, normalize)
    if not rule.keeps_format:
        advantages[codes == FORMAT] = rule.format_penalty
    return GroupResult(
        rewards.astype(np.float32),
        advantages.astype(np.float32),
        (advantages != 0).any(axis=1),
        np.stack([(codes == code).sum(axis=1) for code in CODES], axis=1).astype(np.int32),
    )


def _standardise(rewards: np.ndarray, counted: np.ndarray, normalize: bool) -> np.ndarray:
    """Advantages of the counted rollouts, 0 elsewhere; see `reference.standardise`."""
    count = counted.sum(axis=1, keepdims=True)
    lowest = np.where(counted, rewards, np.inf).min(axis=1, keepdims=True)
    above = np.where(counted, rewards - np.where(count > 0, lowest, 0.0), 0.0)
    mean = above.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(counted, above - mean, 0.0)
    if not normalize:
        return centred
    variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
    return centred / (np.sqrt(variance) + reference.STD_EPSILON)


def _check_codes(is_int8: bool, dtype: str, shape: tuple[int, ...]) -> None:
    if not is_int8 or len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"codes must be int8 [G, N] with N >= 1, not {dtype} {list(shape)}")
