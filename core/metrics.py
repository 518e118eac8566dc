"""Correctness, specificity and their harmonic mean, from codes (SpeciaRL, section 4).

A format failure counts as wrong. An ABSENT code (the judge could not say) is left out of every
figure and counted apart. A figure over no predictions at all is nan.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speciarl.kernels.codes import ABSENT, CODES, FORMAT, NAMES, SPECIFICITY, W

MOST_SPECIFIC = max(SPECIFICITY.values())
Z_95 = 1.959963984540054  # standard normal quantile of .975


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b) of two shares in [0, 1]; 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def wilson_interval(hits: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share hits / n, 95 % by default; (0, 1) for n = 0.

    Unlike the normal interval it stays inside [0, 1] and keeps a width at 0 and n hits.
    Source: Wilson, JASA 22 (1927). It assumes independent predictions, as of one per image;
    several samples of one image are not.
    """
    if n == 0:
        return 0.0, 1.0
    share, shift = hits / n, z * z / n
    centre = (share + shift / 2) / (1 + shift)
    half = z * math.sqrt(share * (1 - share) / n + shift / (4 * n)) / (1 + shift)
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return low, high


@dataclass(frozen=True)
class Tally:
    """How many predictions fell on each code. Tallies of parts add up to that of the whole.

    counts: 8 numbers, position c + 1 for code c: absent, W, A, G, S-, S, S+, format.
    """

    counts: tuple[int, ...] = (0,) * len(CODES)

    def __post_init__(self) -> None:
        if len(self.counts) != len(CODES) or min(self.counts) < 0:
            raise ValueError(f"counts must be {len(CODES)} numbers >= 0, not {self.counts}")

    @classmethod
    def of(cls, codes: np.ndarray | Sequence[int]) -> "Tally":
        """Counts codes of any shape. Raises ValueError for a number that is no code."""
        flat = np.asarray(codes, dtype=np.int64).ravel()
        if flat.size and not (flat.min() >= ABSENT and flat.max() <= FORMAT):
            raise ValueError(f"codes run from {ABSENT} to {FORMAT}: {flat.min()} to {flat.max()}")
        return cls(tuple(np.bincount(flat - ABSENT, minlength=len(CODES)).tolist()))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def count(self, code: int) -> int:
        """Predictions of one code."""
        return self.counts[code - ABSENT]

    @property
    def n(self) -> int:
        """Judged predictions, format failures among them."""
        return sum(self.counts) - self.unjudged

    @property
    def unjudged(self) -> int:
        """Predictions that the judge could not grade; in no other figure."""
        return self.count(ABSENT)

    @property
    def wrong(self) -> int:
        """Wrong answers and format failures."""
        return self.count(W) + self.count(FORMAT)

    @property
    def correctness(self) -> float:
        """1 - wrong / n; an abstention is not wrong."""
        return 1 - self.wrong / self.n if self.n else math.nan

    @property
    def correctness_interval(self) -> tuple[float, float]:
        """95 % interval of `correctness` over the choice of images (Wilson)."""
        return wilson_interval(self.n - self.wrong, self.n)

    @property
    def specificity(self) -> float:
        """Mean points of the answers that are not wrong, over 4; 0 if all are wrong."""
        if not self.n:
            return math.nan
        points = sum(score * self.count(code) for code, score in SPECIFICITY.items())
        right = self.n - self.wrong
        return points / right / MOST_SPECIFIC if right else 0.0

    @property
    def hm(self) -> float:
        """Harmonic mean of correctness and specificity."""
        return harmonic_mean(self.correctness, self.specificity)

    def rates(self) -> dict[str, float]:
        """Name of a code -> its share of n, absent left out; they sum to 1."""
        return {
            NAMES[code]: self.count(code) / self.n if self.n else math.nan
            for code in CODES
            if code != ABSENT
        }

    def as_dict(self) -> dict[str, object]:
        """Every figure, for a JSON line; None where it is undefined, as JSON has no nan."""
        low, high = self.correctness_interval
        figures: dict[str, object] = {
            "n": self.n,
            "unjudged": self.unjudged,
            "correctness": _defined(self.correctness),
            "correctness_95": [low, high],
            "specificity": _defined(self.specificity),
            "hm": _defined(self.hm),
            "rates": {name: _defined(rate) for name, rate in self.rates().items()},
        }
        return figures


@dataclass(frozen=True)
class Report:
    """The tallies of an evaluation, each mapping in order of first appearance."""

    datasets: Mapping[str, Tally]
    domains: Mapping[str, Tally]

    @property
    def total(self) -> Tally:
        """All predictions in one tally."""
        return sum(self.datasets.values(), Tally())

    @property
    def mean_hm(self) -> float:
        """Mean of the HMs of the datasets, each weighing the same; nan if one has no figure."""
        return mean_hm(self.datasets.values())

    def as_dict(self) -> dict[str, object]:
        """Every figure, for a JSON file."""
        return {
            "mean_hm": _defined(self.mean_hm),
            "total": self.total.as_dict(),
            "datasets": {name: tally.as_dict() for name, tally in self.datasets.items()},
            "domains": {name: tally.as_dict() for name, tally in self.domains.items()},
        }


def mean_hm(tallies: Iterable[Tally]) -> float:
    """Mean of the HMs of several datasets (SpeciaRL's average); nan for none."""
    values = [tally.hm for tally in tallies]
    return sum(values) / len(values) if values else math.nan


def tally_by(codes: np.ndarray | Sequence[int], groups: Sequence[str]) -> dict[str, Tally]:
    """One tally per distinct group, in order of first appearance.

    codes: [n] or [n, k]; groups: n names, one for each row.
    Raises ValueError if the lengths differ.
    """
    rows = np.asarray(codes)
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} codes for {len(groups)} group names")
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return {group: Tally.of(rows[indices]) for group, indices in members.items()}


def report(
    codes: np.ndarray | Sequence[int], datasets: Sequence[str], domains: Sequence[str]
) -> Report:
    """Tallies per dataset and per domain.

    codes: [n] int8; datasets, domains: n names. Raises ValueError if the lengths differ.
    """
    return Report(tally_by(codes, datasets), tally_by(codes, domains))


def best_of_k(codes: np.ndarray) -> np.ndarray:
    """The oracle: the best code of each prompt, [n, k] int8 -> [n] int8.

    Any judged answer is better than a format failure, and that better than none at all (ABSENT).
    An upper bound, not a method: it needs the judge (SpeciaRL's best-of-64).
    Raises ValueError unless codes is [n, k] with k >= 1.
    """
    codes = np.asarray(codes, dtype=np.int8)
    if codes.ndim != 2 or codes.shape[1] < 1:
        raise ValueError(f"expected codes of shape [n, k] with k >= 1, not {codes.shape}")
    rank = np.where(codes == FORMAT, W - 0.5, codes)
    return codes[np.arange(len(codes)), rank.argmax(axis=1)]


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
