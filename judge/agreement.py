"""How far two judges, or a judge and people, agree, and what the difference does to the reward."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from os import PathLike
from pathlib import Path

import numpy as np

from speciarl.judge.base import RUNGS, Judge, Pair
from speciarl.kernels.codes import ABSENT, NAMES, S_PLUS, W
from speciarl.kernels.reward import RewardSpec, best_of_n_numpy

LADDER = tuple(NAMES[code] for code in range(W, S_PLUS + 1))


@dataclass(frozen=True)
class LabelledPair:
    """A pair, the category that people gave it (None: not labelled), and the group it is in."""

    pair: Pair
    category: int | None
    group: str
    domain: str = ""


def load_pairs(path: str | PathLike[str]) -> list[LabelledPair]:
    """Pairs of a CSV file with the columns truth and prediction, and, if there, category (a name
    of the ladder, such as "less specific", or empty), group and domain; others are not read, nor
    lines before the header that start with #.

    Without a column `group`, all pairs of one truth (and domain) are a group.
    Raises FileNotFoundError, or ValueError naming the file and the pair.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        reader = csv.DictReader(dropwhile(lambda line: line.startswith("#"), text.splitlines(True)))
        columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: no CSV file in UTF-8: {error}") from None
    for column in ("truth", "prediction"):
        if column not in columns:
            raise ValueError(f"{path}: no column {column!r}; it has: {', '.join(columns)}")
    pairs = [_pair(row, f"{path}: pair {i}") for i, row in enumerate(rows, 1)]
    if not pairs:
        raise ValueError(f"{path}: no pairs")
    return pairs


def _pair(row: dict[str, str], where: str) -> LabelledPair:
    if None in row or None in row.values():
        raise ValueError(f"{where}: as many fields as the header has, please: {row}")
    truth, name = row["truth"].strip(), row.get("category", "").strip()
    if not truth:
        raise ValueError(f"{where}: the truth is empty")
    if name and name not in LADDER:
        raise ValueError(f"{where}: category {name!r} is none of {', '.join(LADDER)}")
    domain = row.get("domain", "")
    return LabelledPair(
        Pair(truth, row["prediction"]),
        LADDER.index(name) if name else None,
        row.get("group") or f"{domain}\0{truth}",
        domain,
    )


def labels_of(pairs: Sequence[LabelledPair]) -> np.ndarray:
    """The people's codes, int8 [n]; ABSENT where a pair is not labelled."""
    return _codes(pair.category for pair in pairs)


def verdicts_of(judge: Judge, pairs: Sequence[LabelledPair]) -> np.ndarray:
    """A judge's codes, int8 [n]; ABSENT where it could not say."""
    return _codes(verdict.category for verdict in judge.grade([one.pair for one in pairs]))


def _codes(categories: Iterable[int | None]) -> np.ndarray:
    return np.array([ABSENT if c is None else c for c in categories], dtype=np.int8)


@dataclass(frozen=True)
class Agreement:
    """Of two judges on the pairs that both could judge.

    confusion [6, 6]: pairs by the first's category (row) and the second's (column), in the order
    of the ladder. unscored: pairs that the first, the second could not judge. groups: those
    compared by reward. changed_groups: those in which some reward differs. changed_rewards: share
    of the pairs in them whose reward differs.
    """

    confusion: np.ndarray
    unscored: tuple[int, int]
    groups: int
    changed_groups: int
    changed_rewards: float

    @property
    def pairs(self) -> int:
        """Pairs that both judged."""
        return int(self.confusion.sum())

    @property
    def same(self) -> float:
        """Share of them with the same category; nan without any."""
        return _ratio(np.trace(self.confusion), self.pairs)

    @property
    def by_category(self) -> dict[str, tuple[int, float, float]]:
        """By name: the first's pairs, the share of them where the second agrees (recall), and the
        share of the second's pairs where the first agrees (precision)."""
        right, first, second = (
            self.confusion.diagonal(),
            self.confusion.sum(1),
            self.confusion.sum(0),
        )
        return {
            name: (int(first[i]), _ratio(right[i], first[i]), _ratio(right[i], second[i]))
            for i, name in enumerate(LADDER)
        }

    def kappa(self, power: int = 2) -> float:
        """Cohen's weighted kappa; disagreements weigh |distance on the ladder| ** power.

        Cohen, "Weighted kappa", Psychological Bulletin 70 (1968). 1: perfect, 0: as by chance;
        nan where both always give one and the same category.
        """
        rungs = np.arange(RUNGS)
        cost = np.abs(rungs[:, None] - rungs[None, :]).astype(float) ** power
        expected = np.outer(self.confusion.sum(1), self.confusion.sum(0)) / max(self.pairs, 1)
        by_chance = (cost * expected).sum()
        return 1 - float((cost * self.confusion).sum() / by_chance) if by_chance else float("nan")


def compare(
    first: np.ndarray, second: np.ndarray, groups: Sequence[str], rule: RewardSpec
) -> Agreement:
    """Agreement of codes [n] and [n]; `groups` [n] says which pairs share a bar under `rule`."""
    both = (first != ABSENT) & (second != ABSENT)
    confusion = np.zeros((RUNGS, RUNGS), dtype=int)
    np.add.at(confusion, (first[both], second[both]), 1)
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if both[i]:
            members.setdefault(group, []).append(i)
    changed = [
        _rewards(first[rows], rule) != _rewards(second[rows], rule) for rows in members.values()
    ]
    return Agreement(
        confusion,
        (int((first == ABSENT).sum()), int((second == ABSENT).sum())),
        len(members),
        sum(bool(one.any()) for one in changed),
        _ratio(sum(int(one.sum()) for one in changed), sum(map(len, changed))),
    )


def _rewards(codes: np.ndarray, rule: RewardSpec) -> np.ndarray:
    return best_of_n_numpy(codes[None], rule, normalize=True).rewards[0]


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")


def report(agreement: Agreement, first: str, second: str) -> str:
    """The figures as text: confusion, agreement by category, kappa, effect on the reward."""
    width = max(map(len, LADDER)) + 2
    lines = [
        f"{agreement.pairs} pairs judged by both (not by {first}: {agreement.unscored[0]}, "
        f"not by {second}: {agreement.unscored[1]})",
        "",
        f"rows: {first}; columns: {second}",
        " " * width + "".join(f"{name:>{width}}" for name in LADDER),
    ]
    for name, row in zip(LADDER, agreement.confusion, strict=True):
        lines.append(f"{name:{width}}" + "".join(f"{count:{width}d}" for count in row))
    lines += ["", f"{'category':{width}}{'pairs':>8}{'recall':>9}{'precision':>11}"]
    for name, (count, recall, precision) in agreement.by_category.items():
        lines.append(f"{name:{width}}{count:8d}{recall:9.3f}{precision:11.3f}")
    return "\n".join(
        [
            *lines,
            "",
            f"same category {agreement.same:.3f}, weighted kappa {agreement.kappa():.3f} "
            f"(quadratic), {agreement.kappa(1):.3f} (linear)",
            f"rewards change in {agreement.changed_groups} of {agreement.groups} groups "
            f"({_ratio(agreement.changed_groups, agreement.groups):.3f}), for "
            f"{agreement.changed_rewards:.3f} of their pairs",
        ]
    )
