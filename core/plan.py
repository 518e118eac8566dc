"""Which rank computes which sequence, in which micro-batch. Pure functions on the host.

Invariants, each asserted by a test:
- every sequence is in exactly one micro-batch, and none is ever cut (so no image is);
- every rank has the same number of micro-batches (collectives stay in step); a rank with too
  few gets empty ones, which the trainer fills with a sequence of zero weight;
- a micro-batch costs at most `budget`, unless it holds one sequence that alone costs more;
- the heaviest rank's cost is at most the mean plus the longest single sequence's, hence within
  10 % of the mean when no sequence costs more than 5 % of a rank's share;
- sequences keep their order, so the samples of a prompt stay together: in a micro-batch they share
  its tokens and its image.

Where prompts are shared, a sequence's cost is its own tokens and its part of the prompt's; a group
that is cut between two ranks or micro-batches has its prompt computed once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MicroBatch = tuple[int, ...]
Prompted = tuple[int, int]


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Cuts the row of sequences into `ranks` contiguous runs of about equal cost.

    A sequence goes to the rank in whose share its midpoint lies, so a run overhangs its share
    by at most half a sequence on either side.
    """
    runs: list[list[int]] = [[] for _ in range(ranks)]
    total = sum(costs)
    start = 0.0
    for index, cost in enumerate(costs):
        runs[min(ranks - 1, int((start + cost / 2) * ranks / total))].append(index)
        start += cost
    return runs


def fill(
    run: Sequence[int], costs: Sequence[int], budget: int, prompts: Sequence[Prompted]
) -> list[MicroBatch]:
    """Fills micro-batches in order, each up to `budget`; a prompt counts once in each."""
    out: list[MicroBatch] = []
    current: list[int] = []
    used = 0
    for index in run:
        group, tokens = prompts[index]
        shared = bool(current) and prompts[current[-1]][0] == group
        more = costs[index] + (0 if shared else tokens)
        if current and used + more > budget:
            out.append(tuple(current))
            current, used, more = [], 0, costs[index] + tokens
        current.append(index)
        used += more
    if current:
        out.append(tuple(current))
    return out


def plan(
    costs: Sequence[int], ranks: int, budget: int, prompts: Sequence[Prompted] | None = None
) -> list[list[MicroBatch]]:
    """Micro-batches of sequence indices, [rank][micro-batch].

    Args:
        costs: tokens of each sequence, after its prompt where `prompts` is given.
        ranks: number of processes.
        budget: tokens of a micro-batch.
        prompts: (group, prompt tokens) of each sequence; neighbours of one group share the prompt.

    Raises:
        ValueError: the budget, the number of ranks or what a sequence costs alone is not positive.
    """
    prompts = prompts or [(index, 0) for index in range(len(costs))]
    alone = [cost + tokens for cost, (_, tokens) in zip(costs, prompts, strict=True)]
    if ranks < 1 or budget < 1 or any(cost < 1 for cost in alone):
        raise ValueError(f"plan needs positive costs, ranks={ranks} and budget={budget}")
    size = Counter(group for group, _ in prompts)
    spread = [cost + n / size[group] for cost, (group, n) in zip(costs, prompts, strict=True)]
    parts = [fill(run, costs, budget, prompts) for run in assign(spread, ranks)]
    most = max(len(part) for part in parts)
    return [part + [()] * (most - len(part)) for part in parts]
