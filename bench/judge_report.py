"""Figures of `judge.py`, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import click


@dataclass
class Result:
    """What one way took for all steps; `calls` are those that the server has answered."""

    pairs: int
    calls: int
    seconds: list[float]
    counts: dict[str, float]
    faults: int
    unlike_taxonomy: int

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds)


Measured = dict[str, list[Result]]


def middle(runs: Sequence[Result]) -> Result:
    """The run of median time."""
    return sorted(runs, key=lambda run: run.total)[len(runs) // 2]


def ratios(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """Calls and seconds of the other ways over ours; calls of warm, if none, count as one."""
    return {
        f"{other} / {ours}": {
            "calls": results[other].calls / max(1, results[ours].calls),
            "seconds": results[other].total / results[ours].total,
        }
        for other in ("each", "published")
        for ours in ("cold", "warm", "overlapped")
    }


def show(results: dict[str, Result]) -> None:
    """The tables."""
    click.echo(
        f"\n{'':12}{'pairs':>8}{'calls':>8}{'seconds':>10}{'verdicts/s':>12}"
        f"{'ms a step, median [min, max]':>32}{'faults':>8}{'unlike':>8}"
    )
    for name, result in results.items():
        steps = [1000 * s for s in result.seconds]
        spread = f"{statistics.median(steps):.0f} [{min(steps):.0f}, {max(steps):.0f}]"
        rate = "-" if name == "overlapped" else f"{result.pairs / result.total:.0f}"
        click.echo(
            f"{name:12}{result.pairs:8}{result.calls:8}{result.total:10.2f}"
            f"{rate:>12}{spread:>32}{result.faults:8}"
            f"{result.unlike_taxonomy:8}"
        )
    click.echo("unlike: verdicts that the taxonomy does not give")
    for name in ("cold", "warm", "overlapped"):
        counts = results[name].counts
        shares = [
            f"{what} {counts.get(f'by_{what}', 0) / results[name].pairs:.1%}"
            for what in ("rule", "batch", "cache")
        ]
        click.echo(f"{name}: answered by {', '.join(shares)}")
    for name, ratio in ratios(results).items():
        click.echo(f"{name:24} calls {ratio['calls']:8.1f}   seconds {ratio['seconds']:8.1f}")
