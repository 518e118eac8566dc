"""Whole toy runs with each rollout engine: same figures, and log-probs that are the trainer's?

    python bench/engines.py                       # native and sglang, 2 ranks, seeds 0 1 2
    python bench/engines.py --seeds 0 --steps 20 --json bench/results/engines.json

Each run is `core/train.py` under torchrun with the toy preset and its own folder below --out.
Finished runs are not repeated, and a run that was interrupted goes on from its newest checkpoint.
SGLang runs on a CPU in the environment that `make test-sglang` makes (rollout/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from speciarl.bench.toyruns import (
    FIGURES,
    base_figures,
    cells,
    evaluation,
    logged,
    outcome,
    run,
    write_record,
)

PARTS = ("generate", "learn", "push", "step", "idle")


def result(folders: Sequence[Path], steps: int) -> dict[str, Any]:
    """Figures a seed; over all steps of all seeds, the largest mismatch and median seconds."""
    every = [line for folder in folders for line in logged(folder)]
    learnt = [line for line in every if "mismatch/max" in line]
    return outcome(folders, steps) | {
        "steps": len(every),
        "mismatch_max": max(line["mismatch/max"] for line in learnt),
        "mismatch_mean": max(line["mismatch/mean"] for line in learnt),
        "alarms": max(line["mismatch/alarms"] for line in every),
        "seconds": {part: median(line[f"time/{part}"] for line in every) for part in PARTS},
    }


def table(results: dict[str, Any], base: dict[str, Any], title: str) -> Table:
    """A row for the base and for each engine."""
    out = Table(title=title)
    out.add_column("engine")
    for where in ("birds", "unseen"):
        for name in ("spec.", "corr.", "HM"):
            out.add_column(f"{where} {name}", justify="right")
    for name in ("max |difference|", "step", "generate", "push"):
        out.add_column(name, justify="right")
    start = [f"{part[name]:.3f}" for part in base_figures(base) for name in FIGURES]
    out.add_row("base", *start)
    for engine, found in results.items():
        times = [f"{found['seconds'][part]:.3f} s" for part in ("step", "generate", "push")]
        out.add_row(engine, *cells(found), f"{found['mismatch_max']:.1e}", *times)
    return out


@click.command()
@click.option("--engines", default="native,sglang", show_default=True, help="Comma-separated.")
@click.option("--ranks", default=2, show_default=True, help="Processes, each with its engine.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Comma-separated.")
@click.option("--steps", default=160, show_default=True, help="Training steps of every run.")
@click.option("--set", "sets", multiple=True, help="section.key=value for every run; repeat.")
@click.option(
    "--out", default=Path("runs/engines"), show_default=True, type=click.Path(path_type=Path)
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write results here.")
def main(
    engines: str,
    ranks: int,
    seeds: str,
    steps: int,
    sets: tuple[str, ...],
    out: Path,
    report: Path | None,
) -> None:
    """Train the toy world with each engine, one run after another."""
    numbers = [int(seed) for seed in seeds.split(",")]
    results: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for engine in engines.split(","):
        folders = []
        for seed in numbers:
            folder = out / f"{engine}-{ranks}-seed{seed}-steps{steps}"
            click.echo(f"{engine}, seed {seed}: {folder}")
            folders.append(run(folder, seed, steps, [f"rollout.engine={engine}", *sets], ranks))
        results[engine] = result(folders, steps)
        base = json.loads(evaluation(folders[0], 0).read_text())["datasets"]
    title = f"{steps} steps, {ranks} ranks, seeds {seeds}; mean ± 95 % t-interval over seeds"
    Console(width=170).print(table(results, base, title))
    if report:
        command = f"python bench/engines.py --ranks {ranks} --seeds {seeds} --steps {steps}"
        record = {"steps": steps, "ranks": ranks, "seeds": numbers, "base": base}
        write_record(report, command, sets, record | {"results": results})


if __name__ == "__main__":
    main()
