"""Who is decoded when: requests become waves of rows, finished rows become groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from speciarl.rollout.engine import Group, Prompt, Request, Rollout


class Row(NamedTuple):
    """One sample to draw."""

    request: int
    """Index of its request."""
    sample_id: int


def plan_waves(requests: Sequence[Request], max_rows: int) -> list[list[Row]]:
    """Rows in the order of the requests, at most `max_rows` to a wave.

    A request stays in one wave, so that its prompt passes once, unless it alone is too large.
    """
    waves: list[list[Row]] = [[]]
    for index, request in enumerate(requests):
        rows = [Row(index, sample_id) for sample_id in request.sample_ids]
        if len(waves[-1]) + len(rows) > max_rows and waves[-1]:
            waves.append([])
        while rows:
            room = max_rows - len(waves[-1])
            if room == 0:
                waves.append([])
                continue
            waves[-1] += rows[:room]
            rows = rows[room:]
    return waves if waves[0] else []


@dataclass
class Assembly:
    """Collects rollouts and gives each group away when it is complete."""

    requests: Sequence[Request]
    _open: dict[str, dict[Row, Rollout | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, request in enumerate(self.requests):
            rows = self._open.setdefault(request.group_key, {})
            rows.update({Row(index, sample_id): None for sample_id in request.sample_ids})

    def add(self, finished: Iterable[tuple[Row, Rollout]]) -> Iterator[Group]:
        """Groups completed by these rollouts, each in the order of its requests."""
        for row, rollout in finished:
            key = rollout.group_key
            rows = self._open[key]
            rows[row] = rollout
            complete = [entry for entry in rows.values() if entry is not None]
            if len(complete) == len(rows):
                del self._open[key]
                yield Group(key, complete)


def distinct_prompts(requests: Iterable[Request]) -> list[Prompt]:
    """Each prompt once (by identity), shortest first: little padding in each chunk."""
    found = {id(request.prompt): request.prompt for request in requests}
    return sorted(found.values(), key=lambda prompt: len(prompt.input_ids))
