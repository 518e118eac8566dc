"""Does it pay to spend samples where the bar is uncertain? The toy world, equal steps, one table.

    python bench/adaptive.py                      # seeds 0 1 2, 160 steps
    python bench/adaptive.py --json bench/results/adaptive.json

Three ways to sample: N completions a prompt; adaptive, with N as the mean that its budget allows;
and N completions a prompt again, at the number that adaptive really asked for on average. So the
comparison is fair both ways: at an equal budget, and at an equal number of samples. Finished runs
are not repeated, and a run that was interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from speciarl.bench.toyruns import (
    FIGURES,
    base_figures,
    cells,
    cpu_seconds,
    evaluation,
    interval,
    logged,
    outcome,
    run,
    run_all,
    write_record,
)


def total(folders: Sequence[Path], name: str) -> list[float]:
    """A scalar summed over the steps of each run."""
    return [sum(step[name] for step in logged(folder)) for folder in folders]


def result(folders: Sequence[Path], steps: int) -> dict[str, Any]:
    """Figures, completions sampled, wall seconds of the steps and processor seconds of the whole
    run, a value a seed."""
    return outcome(folders, steps) | {
        "completions": total(folders, "completions/count"),
        "seconds": total(folders, "time/step"),
        "cpu_seconds": [cpu_seconds(folder) for folder in folders],
    }


def mean_by_step(folders: Sequence[Path], name: str) -> float:
    """A scalar's mean over steps and runs."""
    return sum(total(folders, name)) / sum(len(logged(folder)) for folder in folders)


def table(results: dict[str, Any], base: dict[str, Any], title: str) -> Table:
    """Rows: the base and each way to sample; columns: figures, completions, time."""
    out = Table(title=title)
    out.add_column("sampling")
    for where in ("birds", "unseen"):
        for name in ("spec.", "corr.", "HM"):
            out.add_column(f"{where} {name}", justify="right")
    for name in ("completions", "time", "CPU"):
        out.add_column(name, justify="right")
    out.add_row("base", *(f"{part[f]:.3f}" for part in base_figures(base) for f in FIGURES))
    first = next(iter(results.values()))
    for name, one in results.items():
        count = interval(one["completions"])[0]
        ratios = [
            f"{interval(one[clock])[0] / interval(first[clock])[0]:.2f}"
            for clock in ("seconds", "cpu_seconds")
        ]
        out.add_row(name, *cells(one), f"{count:,.0f}", *ratios)
    return out


def leads(results: dict[str, Any]) -> dict[str, Any]:
    """Adaptive's figures less those of each uniform run: mean, half interval, every seed."""
    found: dict[str, Any] = {}
    for name, one in results.items():
        if name == "adaptive":
            continue
        for where in ("birds", "unseen"):
            for figure in FIGURES:
                pairs = zip(results["adaptive"][where], one[where], strict=True)
                differences = [ours[figure] - theirs[figure] for ours, theirs in pairs]
                mean, half = interval(differences)
                key = f"{where} {figure} over {name}"
                known = None if math.isnan(half) else half
                found[key] = {"mean": mean, "half_95": known, "by_seed": differences}
    return found


Ways = dict[str, tuple[str, ...]]


def run_ways(
    ways: Ways, seeds: Sequence[int], steps: int, out: Path, jobs: int, sets: Sequence[str]
) -> dict[str, list[Path]]:
    """The run folders of each way to sample (its settings by name), one a seed."""

    def one(item: tuple[str, int]) -> Path:
        name, seed = item
        label = "-".join(word.removeprefix("rollout.") for word in ways[name])
        return run(out / f"{label}-seed{seed}-steps{steps}", seed, steps, [*ways[name], *sets])

    folders = run_all([(name, seed) for seed in seeds for name in ways], one, jobs)
    return {name: [folders[name, seed] for seed in seeds] for name in ways}


def spending(folders: Sequence[Path]) -> dict[str, float]:
    """What the adaptive runs asked for: means over steps and seeds."""
    completions, prompts = (
        mean_by_step(folders, name) for name in ("completions/count", "groups/count")
    )
    shares = {
        name: mean_by_step(folders, f"adaptive/{name}")
        for name in ("rounds", "uncertain", "budget_used")
    }
    return {"completions_a_prompt": completions / prompts, **shares}


def show(
    results: dict[str, Any], base: dict[str, Any], spent: dict[str, float], title: str
) -> None:
    """Prints the table, what adaptive spent, and its leads."""
    console = Console(width=150)
    console.print(table(results, base, title))
    console.print(
        f"adaptive: {spent['completions_a_prompt']:.2f} completions a prompt, "
        f"{spent['rounds']:.2f} rounds a step, {spent['uncertain']:.0%} of the bars uncertain at "
        f"the end, {spent['budget_used']:.0%} of the budget used"
    )
    for key, lead in leads(results).items():
        by_seed = ", ".join(f"{value:+.3f}" for value in lead["by_seed"])
        half = "" if lead["half_95"] is None else f" ± {lead['half_95']:.3f}"
        console.print(f"adaptive, {key}: {lead['mean']:+.3f}{half} ({by_seed})")


@click.command()
@click.option("--n", default=10, show_default=True, help="Completions a prompt on average.")
@click.option("--n-start", default=4, show_default=True, help="Adaptive: what each prompt gets.")
@click.option("--n-max", default=24, show_default=True, help="Adaptive: most of a prompt.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Comma-separated.")
@click.option("--steps", default=160, show_default=True, help="Training steps of every run.")
@click.option("--jobs", default=0, help="Runs at once, each on one thread; 0: one a core.")
@click.option("--set", "sets", multiple=True, help="section.key=value for every run; repeat.")
@click.option(
    "--out", default=Path("runs/adaptive"), show_default=True, type=click.Path(path_type=Path)
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write results here.")
def main(
    n: int,
    n_start: int,
    n_max: int,
    seeds: str,
    steps: int,
    jobs: int,
    sets: tuple[str, ...],
    out: Path,
    report: Path | None,
) -> None:
    """Train with uniform and with adaptive N on the toy world and compare them."""
    numbers = [int(seed) for seed in seeds.split(",")]
    adaptive = (f"rollout.n={n}", f"rollout.n_start={n_start}", f"rollout.n_max={n_max}")
    ways: Ways = {f"uniform {n}": (f"rollout.n={n}",), "adaptive": adaptive}
    folders = run_ways(ways, numbers, steps, out, jobs, sets)
    spent = spending(folders["adaptive"])
    equal = round(spent["completions_a_prompt"])
    if equal != n:
        ways = {f"uniform {equal}": (f"rollout.n={equal}",)}
        folders |= run_ways(ways, numbers, steps, out, jobs, sets)
    results = {name: result(paths, steps) for name, paths in folders.items()}
    base = json.loads(evaluation(folders["adaptive"][0], 0).read_text())["datasets"]
    title = f"{steps} steps, seeds {seeds}; mean ± 95 % t-interval over seeds; times: ratios"
    show(results, base, spent, title)
    if report:
        command = f"python bench/adaptive.py --n {n} --n-start {n_start} --n-max {n_max}"
        record = {"steps": steps, "seeds": numbers, "base": base, "results": results}
        record |= {"adaptive": spent, "leads": leads(results)}
        write_record(report, f"{command} --seeds {seeds} --steps {steps}", sets, record)


if __name__ == "__main__":
    main()
