"""Ranks that are threads of one process, for what is decided on the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speciarl.core.world import World


@dataclass
class Rank:
    """A thread that is one of `size` ranks; stands in for a `World`."""

    rank: int
    size: int
    board: list[Any]
    barrier: threading.Barrier

    @property
    def main(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0

    part = World.part

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order."""
        self.board[self.rank] = value
        self.barrier.wait(30)
        out = list(self.board)
        self.barrier.wait(30)
        return out


def on_ranks(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """What `work` returns on each of `size` ranks that run at the same time."""
    board, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        results[rank] = work(Rank(rank, size, board, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
