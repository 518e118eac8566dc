"""One engine over the GPUs of several neighbouring ranks: the first of them owns it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from speciarl.rollout.engine import Group, Request, RolloutEngine, Sampling

T = TypeVar("T")


class TensorGroup:
    """A RolloutEngine of `tp` neighbouring ranks of one machine.

    The owner, the group's first rank, has the engine and gets the group's prompts; the others take
    part in each push of weights, since the policy is sharded over them. Construction and
    `load_weights` are collective over the group, and what fails there on the owner fails on all its
    ranks. The other calls do nothing but on the owner: whoever uses the memory that `sleep` frees
    on another rank must wait for the owner first.

    Args:
        tp: ranks that share the engine.
        start: makes it; called on the owner alone.

    Raises what `start` raises, and ValueError when tp does not divide the ranks of a machine.
    """

    def __init__(self, tp: int, start: Callable[[], RolloutEngine]) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if local % tp or size % tp:
            raise ValueError(
                f"rollout.tp = {tp} does not divide the {local} processes of this machine: an "
                "engine's GPUs are those of neighbouring ranks"
            )
        self.ranks = tp
        self.owner = rank - rank % tp
        groups = [dist.new_group(range(i, i + tp), backend="gloo") for i in range(0, size, tp)]
        self._group = groups[rank // tp]
        self._engine: RolloutEngine | None = None
        self._engine = self._together(start)
        self.about = f"{self._engine.about}, over {tp} ranks" if self._engine else ""

    @property
    def span(self) -> Any:
        """The engine's, see `timeline.Reporting`; on the owner."""
        return getattr(self._engine, "span", None)

    @span.setter
    def span(self, span: Any) -> None:
        if self._engine is not None:
            self._engine.span = span  # type: ignore[attr-defined]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """The owner's groups. Raises ValueError for requests to a rank that has no engine."""
        if self._engine is not None:
            return self._engine.generate(requests, sampling)
        if requests:
            raise ValueError(f"the engine of this rank's group is in rank {self.owner}: ask there")
        return iter(())

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Every rank iterates to the end, the owner sends."""
        tensors = iter(named_tensors)

        def send() -> None:
            assert self._engine is not None
            try:
                self._engine.load_weights(tensors, version=version)
            finally:
                _drain(tensors)

        _empty_cache()  # the owner's engine takes memory here when it wakes
        dist.barrier(group=self._group)
        if self._engine is None:
            _drain(tensors)
        self._together(send)
        _empty_cache()

    def sleep(self) -> None:
        """On the owner."""
        if self._engine is not None:
            self._engine.sleep()

    def wake(self) -> None:
        """On the owner."""
        if self._engine is not None:
            self._engine.wake()

    def check(self) -> None:
        """Raises EngineDead on the owner."""
        if self._engine is not None:
            self._engine.check()

    def close(self) -> None:
        """On the owner."""
        if self._engine is not None:
            self._engine.close()

    def _together(self, work: Callable[[], T]) -> T | None:
        """The owner's work; what it raises is raised on every rank of the group."""
        problem: Exception | None = None
        result: T | None = None
        if dist.get_rank() == self.owner:
            try:
                result = work()
            except Exception as error:
                problem = error
        told = [problem]
        dist.broadcast_object_list(told, src=self.owner, group=self._group)
        if told[0] is not None:
            raise told[0]
        return result


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drain(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Takes part in the gathering of the tensors that are left."""
    for _ in tensors:
        pass
