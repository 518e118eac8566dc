"""Two torchrun agents on one machine train as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import speciarl.core.train
from speciarl.core.config import load_config
from speciarl.core.world import World, free_port

STEPS = 3


def settings(toy: Path, model: Path, out: Path) -> tuple[str, ...]:
    """A run of three steps on eight birds that learns from every sample, however bad."""
    tables = [("train.birds", "birds", "train", 8), ("eval.birds", "birds", "test", 3)]
    words = [
        f"train.out={out}", f"train.steps={STEPS}", "train.prompts=4", "train.mini_batch=2",
        "train.token_budget=90", "train.save_every=0", "train.threads=1", "train.samples_every=0",
        f"model.path={model}", "data.toyworld=''", "data.eval.flowers=none", "data.eval.cars=none",
        "rollout.n=3", "rollout.max_new_tokens=4", "evaluation.every=0",
        # A random model never answers; under this rule a malformed answer counts by itself.
        "reward.rule=speciarl-ordered", "optim.lr=1e-3", "optim.eps=1e-4",
    ]  # fmt: skip
    for table, folder, split, k in tables:
        words += [f"data.{table}.path={toy / folder}", f"data.{table}.split={split}"]
        words += [f"data.{table}.k={k}", f"data.{table}.taxonomy={toy / 'taxonomy.json'}"]
    return tuple(words)


def agents(count: int, words: tuple[str, ...], folder: Path) -> list[subprocess.Popen[str]]:
    """`count` torchrun agents of one process each, as on as many machines."""
    sets = [part for word in words for part in ("--set", word)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count),
        "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
        "--rdzv-endpoint", f"localhost:{free_port()}",
        speciarl.core.train.__file__, "--quiet", *sets,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(count)
    ]


@pytest.mark.timeout(300)
def test_two_agents_train_as_one_process(
    toy_root: Path, toy_model_dir: Path, world: World, tmp_path: Path
) -> None:
    running = agents(2, settings(toy_root, toy_model_dir, tmp_path / "two"), tmp_path)
    try:
        config = load_config("toyworld", None, settings(toy_root, toy_model_dir, tmp_path / "one"))
        speciarl.core.train.train(config, world, quiet=True)
        for agent in running:
            output, _ = agent.communicate(timeout=240)
            assert agent.returncode == 0, output[-4000:]
    finally:
        for agent in running:
            agent.kill()
    one, two = (load_file(tmp_path / x / "model" / "model.safetensors") for x in ("one", "two"))
    before = load_file(toy_model_dir / "model.safetensors")
    assert one.keys() == two.keys() == before.keys()
    moved = max((one[name] - before[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4, msg=name)
