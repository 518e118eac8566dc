"""Which reward rule earns what, on the toy world: rules x seeds, equal steps, one table.

    python bench/rewards.py                       # every rule, seeds 0 1 2
    python bench/rewards.py --rules speciarl,static-binary --seeds 0 --steps 40
    python bench/rewards.py --json bench/results/rewards.json

Each run is `core/train.py` with the toy preset and its own folder below --out. Finished runs are
not repeated, and a run that was interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from speciarl.bench.toyruns import (
    FIGURES,
    base_figures,
    cells,
    evaluation,
    interval,
    outcome,
    run,
    run_all,
    write_record,
)

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
    out.add_row("base", *(f"{part[f]:.3f}" for part in base_figures(base) for f in FIGURES))
    for rule, result in results.items():
        out.add_row(rule, *cells(result))
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

    def one(item: tuple[str, int]) -> Path:
        rule, seed = item
        folder = out / f"{rule}-seed{seed}-steps{steps}"
        return run(folder, seed, steps, [f"reward.rule={rule}", *sets])

    folders = run_all(work, one, jobs)
    results = {rule: outcome([folders[rule, seed] for seed in numbers], steps) for rule in names}
    base = json.loads(evaluation(folders[work[0]], 0).read_text())["datasets"]
    claims = judge_claim(results, base)
    console = Console(width=120)
    title = f"{steps} steps, seeds {seeds}; mean ± 95 % t-interval over seeds"
    console.print(table(results, base, title))
    for rule, claim in claims.items():
        console.print(f"{rule}: " + ", ".join(f"{k} {_short(v)}" for k, v in claim.items()))
    if report:
        command = f"python bench/rewards.py --rules {rules} --seeds {seeds} --steps {steps}"
        record = {"steps": steps, "seeds": numbers, "base": base, "results": results}
        write_record(report, command, sets, record | {"claims": claims})


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
