"""Which rank computes which sequence, in which micro-batch. Pure functions on the host.

Invariants, each asserted by a test:
- every sequence is in exactly one micro-batch, and none is ever cut (so no image is);
- every rank has the same number of micro-batches (collectives stay in step); a rank with too
  few gets empty ones, which the trainer fills with a sequence of zero weight;
- a micro-batch costs at most `budget`, unless it holds one sequence that alone costs more;
- the heaviest rank's cost is at most the mean plus the longest single sequence's, hence within
  10 % of the mean when no sequence costs more than 5 % of a rank's share;
- sequences keep their order, so the samples of a prompt stay together and share its image.
"""

from __future__ import annotations

from collections.abc import Sequence

MicroBatch = tuple[int, ...]


def assign(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Cuts the row of sequences into `ranks` contiguous runs of about equal cost.

    A sequence goes to the rank in whose share its midpoint lies, so a run overhangs its share
    by at most half a sequence on either side.
    """
    runs: list[list[int]] = [[] for _ in range(ranks)]
    total = sum(costs)
    start = 0
    for index, cost in enumerate(costs):
        runs[min(ranks - 1, int((start + cost / 2) * ranks / total))].append(index)
        start += cost
    return runs


def fill(run: Sequence[int], costs: Sequence[int], budget: int) -> list[MicroBatch]:
    """Fills micro-batches in order, each up to `budget`."""
    out: list[MicroBatch] = []
    current: list[int] = []
    used = 0
    for index in run:
        if current and used + costs[index] > budget:
            out.append(tuple(current))
            current, used = [], 0
        current.append(index)
        used += costs[index]
    if current:
        out.append(tuple(current))
    return out


def plan(costs: Sequence[int], ranks: int, budget: int) -> list[list[MicroBatch]]:
    """Micro-batches of sequence indices, [rank][micro-batch].

    Args:
        costs: tokens of each sequence.
        ranks: number of processes.
        budget: tokens of a micro-batch.

    Raises:
        ValueError: a cost, the budget or the number of ranks is not positive.
    """
    if ranks < 1 or budget < 1 or any(cost < 1 for cost in costs):
        raise ValueError(f"plan needs positive costs, ranks={ranks} and budget={budget}")
    parts = [fill(run, costs, budget) for run in assign(costs, ranks)]
    most = max(len(part) for part in parts)
    return [part + [()] * (most - len(part)) for part in parts]
