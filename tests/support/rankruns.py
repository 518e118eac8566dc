"""A whole short run on several processes, its verdicts drawn by lot.

rankruns.py ROOT MODEL OUT SIZE [section.key=value ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch.multiprocessing

import speciarl.core.collect
from runs import lot, run_config
from speciarl.core.train import train
from speciarl.core.world import free_port, init_world, leave_world


def run_rank(
    rank: int, size: int, port: int, root: Path, model: Path, out: Path, words: tuple[str, ...]
) -> None:
    """One process of the run."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    speciarl.core.collect.codes_of = lot
    world = init_world(threads=1, device="cpu")
    train(run_config(root, model, out, *words), world, quiet=True)
    leave_world()


def run(root: Path, model: Path, out: Path, size: int, *words: str) -> Path:
    """Starts this script and waits for it; returns the run folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    support = [str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(support)
    done = subprocess.run(
        [sys.executable, __file__, str(root), str(model), str(out), str(size), *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def main() -> None:
    root, model, out = (Path(word) for word in sys.argv[1:4])
    size = int(sys.argv[4])
    arguments = (size, free_port(), root, model, out, tuple(sys.argv[5:]))
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=size, start_method="fork")


if __name__ == "__main__":
    main()
