"""Short runs of a toy model on a small toy world: their settings, and what they leave behind."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from speciarl.core.config import Config
from speciarl.core.parts import build
from speciarl.core.settings import load
from speciarl.core.trainer import Trainer
from speciarl.core.world import World

Sets = dict[str, Any]


def table(root: Path, domain: str, split: str, k: int = 0) -> Sets:
    """A data table of the toy world."""
    return {
        "format": "cub",
        "path": str(root / domain),
        "split": split,
        "k": k,
        "taxonomy": str(root / "taxonomy.json"),
    }


def settings(root: Path, model: Path, out: Path) -> Sets:
    """Three steps of two groups of three, four images of birds and of flowers held out."""
    return {
        "train": {"out": str(out), "steps": 3, "prompts": 2, "mini_batch": 2, "threads": 1},
        "model": {"path": str(model)},
        "data": {
            "instruction": "Answer inside <answer> </answer>.",
            "max_prompt_tokens": 64,
            "train": {"birds": table(root, "birds", "train")},
            "eval": {
                "birds": table(root, "birds", "test", 4),
                "flowers": table(root, "flowers", "test", 4),
            },
        },
        "rollout": {"n": 3, "max_new_tokens": 6},
        "optim": {"lr": 1e-3},
        "evaluation": {"every": 0},
    }


def run_config(root: Path, model: Path, out: Path, *sets: str) -> Config:
    """The settings above, with words `section.key=value` over them."""
    return load(Config, [settings(root, model, out)], sets)


def open_trainer(config: Config, world: World) -> Trainer:
    """A trainer that has not begun; close its parts."""
    return Trainer(config, world, build(config, world, quiet=True))


def lot(judge: object, truths: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Stands in for `codes_of`: a category from W to S+ drawn by the text, so groups differ."""
    return np.array([zlib.crc32(text.encode()) % 6 for text in texts], dtype=np.int8)


def json_of(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_lines(out: Path) -> list[dict[str, Any]]:
    """What was logged of each step, evaluations left out."""
    return [line for line in lines(out / "metrics.jsonl") if "time/step" in line]


def stored(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, moments, step counts."""
    folder = out / "checkpoints" / f"step-{step}"
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert one and one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
