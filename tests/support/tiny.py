"""Tiny checkpoints, pictures, completions, and log-probs by transformers' own code.

For tests and for the processes they start.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen3VLConfig,
)

from speciarl.core.batch import Item
from speciarl.core.examples import Example
from speciarl.core.prompts import PromptBuilder
from speciarl.core.toymodel import save_toymodel
from speciarl.rollout.engine import Prompt

KINDS = ("toy", "tied", "qwen3")
LAYERS = 2
"""Of the language model."""
SIZES = ((56, 56), (84, 56), (56, 84), (84, 84), (56, 56), (84, 56))
"""Width and height of the pictures: 4, 6 or 9 image tokens."""


def save_tiny(folder: Path, kind: str) -> Path:
    """A random checkpoint in HF layout: "toy" or "tied" (Qwen2.5-VL), "qwen3" (Qwen3-VL)."""
    save_toymodel(folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = config.text_config.layer_types[:LAYERS]
    if kind == "tied":
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    if kind == "qwen3":
        config = _qwen3_config(config)
        preprocessor = folder / "preprocessor_config.json"
        settings = json.loads(preprocessor.read_text())
        size = {"shortest_edge": 4 * 32**2, "longest_edge": 9 * 32**2}
        settings |= {"patch_size": 16, "processor_class": "Qwen3VLProcessor", "size": size}
        preprocessor.write_text(json.dumps(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = AutoModelForImageTextToText.from_config(config)
        sharpen(model)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _qwen3_config(toy: Any) -> Qwen3VLConfig:
    text = toy.text_config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "pad_token_id")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
    rope["mrope_section"] = [8, 4, 4]
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=text["hidden_size"],
        num_position_embeddings=256, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen3VLConfig(
        text_config={k: text[k] for k in kept} | {"head_dim": 32, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: getattr(toy, name) for name in tokens},
    )


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Weights so large that attention is not uniform: else wrong positions would hardly show.

    Biases and norms, which a new model sets to constants, become random too.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(2.0)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def perturb(parameters: Mapping[str, nn.Parameter], scale: float = 0.005) -> None:
    """Adds noise that depends on the name alone, to sharded and plain parameters alike."""
    for name, parameter in parameters.items():
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = scale * torch.randn(parameter.shape, generator=draw)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter.add_(noise)


def examples_in(folder: Path) -> list[Example]:
    """One noise picture of each of SIZES, drawn where it is missing."""
    out = []
    for i, (width, height) in enumerate(SIZES):
        path = folder / f"{i}.png"
        if not path.exists():
            noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(path)
        out.append(Example(f"noise/{i}", path, "golden warbler", "noise", "birds"))
    return out


class Tiny:
    """One of the checkpoints with its prompts, one for each picture."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.folder = folder
        self.builder = PromptBuilder(folder, instruction="Answer inside <answer> </answer>.")
        self.banned = tuple(self.builder.banned_ids)
        self.examples = examples_in(pictures)
        self.prompts = {e.key: self.builder.build(e) for e in self.examples}

    def prompt(self, example: Example) -> Prompt:
        return self.prompts[example.key]

    def completions(self, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        """Random ids, free of image and video placeholders."""
        allowed = np.setdiff1d(np.arange(len(self.builder.tokenizer)), self.banned)
        draw = np.random.default_rng(seed)
        return [draw.choice(allowed, length).tolist() for length in lengths]

    def items(self, seed: int = 0) -> list[Item]:
        """Seven completions under five pictures; the first picture has three of them."""
        prompts = [self.prompts[f"noise/{i}"] for i in (0, 0, 1, 2, 3, 4, 0)]
        every = self.completions((1, 5, 9, 3, 7, 2, 4), seed)
        return [Item(prompt, ids) for prompt, ids in zip(prompts, every, strict=True)]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' own model, unsharded."""
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype)


def plain_table(model: Any, item: Item, banned: Sequence[int], temperature: float = 1.0) -> Tensor:
    """[completion, V] log-probs by transformers' own unpacked forward over the whole sequence."""
    ids = torch.cat([item.prompt.input_ids, torch.tensor(item.ids)])[None]
    images = dict(item.prompt.images)
    if images:
        images["pixel_values"] = images["pixel_values"].to(model.dtype)
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **images).logits[0]
    logits = logits[len(item.prompt.input_ids) - 1 : -1] / temperature
    banned_ids = torch.tensor(banned, dtype=torch.long)
    return logits.index_fill(1, banned_ids, float("-inf")).log_softmax(-1)


def plain_logprobs(
    model: Any, items: Sequence[Item], banned: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probs of all completions, one after another, each in a forward of its own."""
    return torch.cat(
        [
            plain_table(model, item, banned, temperature).gather(1, torch.tensor(item.ids)[:, None])
            for item in items
        ]
    )[:, 0]


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """For each tensor the norm of the difference over the norm of what is wanted."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    return {
        name: float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in wanted.items()
    }
