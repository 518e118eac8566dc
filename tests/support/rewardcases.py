"""Reward rules to test, every small group, and the rewards of a group in plain Python."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np

from speciarl.kernels.codes import ABSENT, CODES, FORMAT, S_MINUS, S_PLUS, A, G, S, W
from speciarl.kernels.reward import RULES, RewardSpec

TABLE = (-0.3, 0.1, 0.1, 0.7, 0.7, 0.2)
SPECS = [RewardSpec(rule=rule, table=TABLE if rule == "table" else None) for rule in RULES] + [
    RewardSpec(rule="speciarl-ordered", wrong_penalty=0.0, format_penalty=-0.25),
    RewardSpec(rule="table", table=(0.7,) * 6),
]
STATIC: dict[str, dict[int, float]] = {
    "static-binary": {S: 1, S_PLUS: 1},
    "static-graded-1": {A: 0.25, G: 0.5, S_MINUS: 0.75, S: 1, S_PLUS: 1},
    "static-graded-2": {G: 0.5, S_MINUS: 0.75, S: 1, S_PLUS: 1},
    "static-graded-3": {S_MINUS: 0.75, S: 1, S_PLUS: 1},
}


def groups_of(size: int) -> np.ndarray:
    """Every multiset of `size` codes, each row in a shuffled order."""
    rng = random.Random(size)
    rows = [list(row) for row in itertools.combinations_with_replacement(CODES, size)]
    for row in rows:
        rng.shuffle(row)
    return np.array(rows, dtype=np.int8)


def by_hand(group: list[int], spec: RewardSpec, normalize: bool) -> tuple[list[float], list[float]]:
    """Rewards and advantages of one group, by the rule's words."""
    judged = [code for code in group if code not in (ABSENT, FORMAT)]
    best = max(judged, default=W)
    bar = {S_PLUS: S, W: A}.get(best, best)

    def reward(code: int) -> float:
        if code == ABSENT:
            return 0.0
        if code == FORMAT:
            return spec.format_penalty
        if spec.rule == "table":
            return TABLE[code] if spec.table == TABLE else 0.7
        if spec.rule.startswith("static"):
            return STATIC[spec.rule.replace("-published", "")].get(code, 0.0)
        if code >= bar:
            return 1.0
        return -spec.wrong_penalty if spec.rule == "speciarl-ordered" and code == W else 0.0

    published = spec.rule == "speciarl" or spec.rule.endswith("-published")
    rewards = [reward(code) for code in group]
    counted = [i for i, c in enumerate(group) if c != ABSENT and (published or c != FORMAT)]
    values = [rewards[i] for i in counted]
    advantages = [0.0] * len(group)
    if len(values) >= 2 and len(set(values)) > 1:
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        for i in counted:
            advantages[i] = (rewards[i] - mean) / (std + 1e-6 if normalize else 1.0)
    for i, code in enumerate(group):
        if code == FORMAT and not published:
            advantages[i] = spec.format_penalty
    return rewards, advantages


def name_of(spec: RewardSpec) -> str:
    """For the ids of tests."""
    return f"{spec.rule}{spec.wrong_penalty}{spec.table}"
