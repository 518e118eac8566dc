"""Work that all ranks do together and of which all ranks learn the outcome."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(action: Callable[[], T], failed: str, error: type[Exception]) -> list[T]:
    """Run `action` on every rank; the picklable results by rank, on every rank. Collective.

    Doubles as a barrier. Raises `error`, on every rank, if the action raised on any: its message
    is `failed` followed by each failing rank's reason.
    """
    cause: Exception | None = None
    own: tuple[str | None, Any]
    try:
        own = (None, action())
    except Exception as caught:
        cause, own = caught, (str(caught) or repr(caught), None)
    outcomes: list[tuple[str | None, Any]] = [own]
    if world_size() > 1:
        outcomes = [own] * world_size()
        dist.all_gather_object(outcomes, own)
    reasons = {at: reason for at, (reason, _) in enumerate(outcomes) if reason is not None}
    if reasons:
        raise error(f"{failed}: {by_rank(reasons)}") from cause
    return [result for _, result in outcomes]


def by_rank(reasons: dict[int, str]) -> str:
    """Reasons of failing ranks as one line, the rank named where there are several ranks."""
    if world_size() == 1:
        return reasons[0]
    return "; ".join(f"rank {at}: {reason}" for at, reason in sorted(reasons.items()))
