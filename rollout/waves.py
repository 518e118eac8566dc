"""Who is decoded when: requests become waves of rows, finished rows become groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


class Assembly:
    """Collects rollouts and gives each group away when it is complete."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._keys = [request.group_key for request in requests]
        self._rollouts: dict[str, dict[Row, Rollout | None]] = {}
        for index, request in enumerate(requests):
            rows = self._rollouts.setdefault(request.group_key, {})
            rows.update({Row(index, sample_id): None for sample_id in request.sample_ids})
        self._missing = {key: len(rows) for key, rows in self._rollouts.items()}

    def add(self, finished: Iterable[tuple[Row, Rollout | None]]) -> Iterator[Group]:
        """Groups completed by these rollouts, each in the order of its requests.

        None stands for a rollout that cannot be used: its group does without it.
        """
        for row, rollout in finished:
            key = self._keys[row.request]
            self._rollouts[key][row] = rollout
            self._missing[key] -= 1
            if self._missing[key] == 0:
                found = self._rollouts.pop(key).values()
                yield Group(key, [rollout for rollout in found if rollout is not None])


def distinct_prompts(requests: Iterable[Request]) -> list[Prompt]:
    """Each prompt once (by identity), shortest first: little padding in each chunk."""
    found = {id(request.prompt): request.prompt for request in requests}
    return sorted(found.values(), key=lambda prompt: len(prompt.input_ids))
