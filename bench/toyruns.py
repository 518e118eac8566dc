"""What benches of whole toy runs share: running them side by side, and what came of each."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress

FIGURES = ("specificity", "correctness", "hm")
IN_DOMAIN, OUT_OF_DOMAIN = ("birds",), ("flowers", "cars")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
TRAIN = Path(__file__).resolve().parent.parent / "core" / "train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
CPU = "cpu_seconds.txt"
Work = TypeVar("Work")


def evaluation(folder: Path, step: int) -> Path:
    """The metrics file of a run's evaluation."""
    return folder / "evaluation" / f"step-{step:06d}" / "metrics.json"


def run(folder: Path, seed: int, steps: int, sets: Sequence[str], ranks: int = 1) -> Path:
    """One training run of so many processes, unless it is there already; returns its folder.

    Raises:
        RuntimeError: the run failed; the message names its log.
    """
    if evaluation(folder, steps).exists() and evaluation(folder, 0).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        f"train.seed={seed}",
        f"train.steps={steps}",
        f"train.out={folder}",
        "train.threads=1",
        "train.save_every=40",
        "evaluation.every=0",
        *sets,
    ]
    launcher = [*TORCHRUN, "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(TRAIN)]
    command += [word for setting in settings for word in ("--set", setting)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        _, status, usage = os.wait4(child.pid, 0)
    code = child.returncode = os.waitstatus_to_exitcode(status)
    with (folder / CPU).open("a") as file:
        file.write(f"{usage.ru_utime + usage.ru_stime:.2f}\n")
    if code:
        raise RuntimeError(f"{folder.name}: exit code {code}, see {folder / 'log.txt'}")
    return folder


def cpu_seconds(folder: Path) -> float:
    """Processor time of a run's processes, start and evaluations included; other work on the
    machine hardly changes it."""
    return sum(map(float, (folder / CPU).read_text().split()))


def run_all(work: Sequence[Work], one: Callable[[Work], Path], jobs: int = 0) -> dict[Work, Path]:
    """The folder of each run, `jobs` at once (0: one a core), with a bar."""
    with Progress() as bar, ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        task = bar.add_task("runs", total=len(work))
        futures = [pool.submit(one, item) for item in work]
        folders = {}
        for item, future in zip(work, futures, strict=True):
            folders[item] = future.result()
            bar.advance(task)
    return folders


def logged(folder: Path) -> list[dict[str, float]]:
    """What a run logged of each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "time/step" in line]


def figures(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Mean of each figure over the named data sets."""
    sets = json.loads(path.read_text())["datasets"]
    return {f: sum(sets[name][f] for name in names) / len(names) for f in FIGURES}


def outcome(folders: Sequence[Path], steps: int) -> dict[str, Any]:
    """Figures after training, of each run: in domain, out of it, and by data set."""
    last = [evaluation(folder, steps) for folder in folders]
    return {
        "birds": [figures(path, IN_DOMAIN) for path in last],
        "unseen": [figures(path, OUT_OF_DOMAIN) for path in last],
        "by_dataset": [json.loads(path.read_text())["datasets"] for path in last],
    }


def base_figures(base: dict[str, Any]) -> list[dict[str, float]]:
    """Figures in and out of domain of the policy before training, from its data sets."""
    unseen = {f: sum(base[d][f] for d in OUT_OF_DOMAIN) / len(OUT_OF_DOMAIN) for f in FIGURES}
    return [base["birds"], unseen]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % t-interval over seeds; nan for one seed)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T_95[min(n - 2, len(T_95) - 1)] * deviation / math.sqrt(n)


def cells(result: dict[str, Any]) -> list[str]:
    """Mean and interval of every figure of an `outcome`, birds then unseen."""
    out = []
    for where in ("birds", "unseen"):
        for figure in FIGURES:
            mean, half = interval([seed[figure] for seed in result[where]])
            out.append(f"{mean:.3f}" + ("" if math.isnan(half) else f" ±{half:.3f}"))
    return out


def write_record(path: Path, command: str, sets: Sequence[str], record: dict[str, Any]) -> None:
    """The results as JSON, with the command and the machine they came from."""
    head = {
        "command": command + "".join(f" --set {setting}" for setting in sets),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | record, indent=1) + "\n")
