"""Kills runs with SIGKILL at random moments, resumes them, compares the final weights bitwise.

    python bench/kills.py                     # ten kills of a 20-step toy run
    python bench/kills.py --kills 3 --seed 7

The moments are uniform between the first step and the end of the run; a checkpoint is written
after every second step, so some kills fall into a save.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from safetensors.torch import load_file

TRAIN = Path(__file__).resolve().parent.parent / "core" / "train.py"


def command(out: Path, steps: int) -> list[str]:
    """A short toy run: few evaluation images, a checkpoint every second step."""
    settings = [
        f"train.out={out}",
        f"train.steps={steps}",
        "train.save_every=2",
        "train.threads=1",
        "evaluation.every=0",
        *(f"data.eval.{name}.k=20" for name in ("birds", "flowers", "cars")),
    ]
    return [sys.executable, str(TRAIN), "--quiet", *(w for s in settings for w in ("--set", s))]


def start(out: Path, steps: int) -> subprocess.Popen[bytes]:
    """The run, in the background; output goes to its log."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("a") as log:
        return subprocess.Popen(
            command(out, steps), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits for a run's normal end."""
    if process.wait():
        raise click.ClickException(f"the run failed: see {out / 'log.txt'}")


def weights(out: Path, steps: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((out / "checkpoints" / f"step-{steps}").rglob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bits."""
    same = {n for n in a.keys() & b.keys() if torch.equal(a[n].view(-1), b[n].view(-1))}
    return sorted((a.keys() | b.keys()) - same)


def logged(out: Path) -> int:
    """Lines of metrics written so far."""
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@click.command()
@click.option("--kills", default=10, show_default=True, help="Runs that are killed and resumed.")
@click.option("--steps", default=20, show_default=True, help="Steps of the run.")
@click.option("--seed", default=0, show_default=True, help="Of the kill moments.")
@click.option(
    "--out", default=Path("runs/kills"), show_default=True, type=click.Path(path_type=Path)
)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write results here.")
def main(kills: int, steps: int, seed: int, out: Path, report: Path | None) -> None:
    """Kill -9 at random moments, resume, compare."""
    shutil.rmtree(out, ignore_errors=True)
    reference = out / "uninterrupted"
    process = start(reference, steps)
    begun = time.monotonic()
    first = 0.0
    while process.poll() is None:
        time.sleep(0.05)
        if not first and logged(reference):
            first = time.monotonic() - begun
    whole = time.monotonic() - begun
    finish(process, reference)
    wanted = weights(reference, steps)
    moments = random.Random(seed)
    rows = []
    for trial in range(kills):
        folder = out / f"killed-{trial}"
        process = start(folder, steps)
        after = moments.uniform(first, whole)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        saved = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
        finish(start(folder, steps), folder)
        wrong = differing(wanted, weights(folder, steps))
        rows.append({"after_s": after, "killed": killed, "found": saved, "differing": wrong})
        click.echo(
            f"kill {trial + 1}/{kills} after {after:.1f} s{'' if killed else ' (had ended)'}, "
            f"found {', '.join(saved) or 'no checkpoint'}: "
            + ("bit-identical" if not wrong else f"{len(wrong)} tensors differ, e.g. {wrong[0]}")
        )
    bad = sum(bool(row["differing"]) for row in rows)
    click.echo(f"{kills - bad} of {kills} resumed runs are bit-identical ({len(wanted)} tensors)")
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(
            json.dumps({"steps": steps, "seed": seed, "kills": rows}, indent=1) + "\n"
        )
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
