"""Which reward rule earns what, on the toy world: rules x seeds, equal steps, one table.

    python bench/rewards.py                       # every rule, seeds 0 1 2
    python bench/rewards.py --rules speciarl,static-binary --seeds 0 --steps 40
    python bench/rewards.py --json bench/results/rewards.json

Each run is `core/train.py` with the toy preset and its own folder below --out. Finished runs are
not repeated, and a run that was interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

RULES = (
    "speciarl",
    "speciarl-guarded",
    "speciarl-ordered",
    "static-binary",
    "static-graded-1",
    "static-graded-2",
    "static-graded-3",
)
OURS = RULES[:3]
FIGURES = ("specificity", "correctness", "hm")
IN_DOMAIN, OUT_OF_DOMAIN = ("birds",), ("flowers", "cars")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TRAIN = Path(__file__).resolve().parent.parent / "core" / "train.py"


def evaluation(folder: Path, step: int) -> Path:
    """The metrics file of a run's evaluation."""
    return folder / "evaluation" / f"step-{step:06d}" / "metrics.json"


def run(rule: str, seed: int, steps: int, out: Path, sets: Sequence[str]) -> Path:
    """One training run, unless it is there already; returns its folder.

    Raises:
        RuntimeError: the run failed; the message names its log.
    """
    folder = out / f"{rule}-seed{seed}-steps{steps}"
    if evaluation(folder, steps).exists() and evaluation(folder, 0).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        f"reward.rule={rule}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        f"train.out={folder}",
        "train.threads=1",
        "train.save_every=40",
        "evaluation.every=0",
        *sets,
    ]
    command = [sys.executable, str(TRAIN), *(w for s in settings for w in ("--set", s))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=env, check=False).returncode
    if code:
        raise RuntimeError(f"{rule}, seed {seed}: exit code {code}, see {folder / 'log.txt'}")
    return folder


def figures(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Mean of each figure over the named data sets."""
    sets = json.loads(path.read_text())["datasets"]
    return {f: sum(sets[name][f] for name in names) / len(names) for f in FIGURES}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % t-interval over seeds; nan for one seed)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T_95[min(n - 2, len(T_95) - 1)] * deviation / math.sqrt(n)


def judge_claim(results: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The claim, checked for each dynamic rule: gain, honesty, and the lead over static-binary."""
    low = base["birds"]["correctness_95"][0]
    static = results.get("static-binary")
    claims: dict[str, Any] = {}
    for rule in OURS:
        if rule not in results:
            continue
        birds = results[rule]["birds"]
        gain = interval([s["hm"] for s in birds])[0] - base["birds"]["hm"]
        correct = interval([s["correctness"] for s in birds])[0]
        claim: dict[str, Any] = {
            "hm_gain": gain,
            "hm_gain_at_least_.10": gain >= 0.10,
            "correctness": correct,
            "correctness_not_below_base": correct >= low,
        }
        if static:
            leads = [
                ours["correctness"] - theirs["correctness"]
                for ours, theirs in zip(birds, static["birds"], strict=True)
            ]
            claim["least_lead_over_static_binary"] = min(leads)
            claim["lead_at_least_.10_on_every_seed"] = min(leads) >= 0.10
        claims[rule] = claim
    return claims


def table(results: dict[str, Any], base: dict[str, Any], title: str) -> Table:
    """Rows: the base and every rule; columns: figures in and out of domain."""
    out = Table(title=title)
    out.add_column("rule")
    for where in ("birds", "unseen"):
        for name in ("spec.", "corr.", "HM"):
            out.add_column(f"{where} {name}", justify="right")
    inside = base["birds"]
    unseen = {f: sum(base[d][f] for d in OUT_OF_DOMAIN) / len(OUT_OF_DOMAIN) for f in FIGURES}
    out.add_row("base", *(f"{d[f]:.3f}" for d in (inside, unseen) for f in FIGURES))
    for rule, result in results.items():
        cells = []
        for where in ("birds", "unseen"):
            for figure in FIGURES:
                mean, half = interval([s[figure] for s in result[where]])
                cells.append(f"{mean:.3f}" + ("" if math.isnan(half) else f" ±{half:.3f}"))
        out.add_row(rule, *cells)
    return out


@click.command()
@click.option("--rules", default=",".join(RULES), show_default=True, help="Comma-separated.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Comma-separated.")
@click.option("--steps", default=160, show_default=True, help="Training steps of every run.")
@click.option("--jobs", default=0, help="Runs at once, each on one thread; 0: one a core.")
@click.option("--set", "sets", multiple=True, help="section.key=value for every run; repeat.")
@click.option(
    "--out", default=Path("runs/rewards"), show_default=True, type=click.Path(path_type=Path)
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write results here.")
def main(
    rules: str,
    seeds: str,
    steps: int,
    jobs: int,
    sets: tuple[str, ...],
    out: Path,
    report: Path | None,
) -> None:
    """Train every rule with every seed on the toy world and compare them."""
    names, numbers = rules.split(","), [int(s) for s in seeds.split(",")]
    work = [(rule, seed) for seed in numbers for rule in names]
    with Progress() as bar, ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        task = bar.add_task("runs", total=len(work))
        futures = [pool.submit(run, rule, seed, steps, out, sets) for rule, seed in work]
        folders = {}
        for pair, future in zip(work, futures, strict=True):
            folders[pair] = future.result()
            bar.advance(task)
    results: dict[str, Any] = {}
    for rule in names:
        last = [evaluation(folders[rule, seed], steps) for seed in numbers]
        results[rule] = {
            "birds": [figures(path, IN_DOMAIN) for path in last],
            "unseen": [figures(path, OUT_OF_DOMAIN) for path in last],
            "by_dataset": [json.loads(path.read_text())["datasets"] for path in last],
        }
    base = json.loads(evaluation(folders[work[0]], 0).read_text())["datasets"]
    claims = judge_claim(results, base)
    console = Console(width=120)
    title = f"{steps} steps, seeds {seeds}; mean ± 95 % t-interval over seeds"
    console.print(table(results, base, title))
    for rule, claim in claims.items():
        console.print(f"{rule}: " + ", ".join(f"{k} {_short(v)}" for k, v in claim.items()))
    if report:
        record = {
            "command": f"python bench/rewards.py --rules {rules} --seeds {seeds} --steps {steps}"
            + "".join(f" --set {setting}" for setting in sets),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "steps": steps,
            "seeds": numbers,
            "base": base,
            "results": results,
            "claims": claims,
        }
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(record, indent=1) + "\n")


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
