"""What one GPU holds with trainer, rollout engine and judge on it: arithmetic, nothing measured.

    python bench/memory_budget.py                    # the tables of rollout/README.md
    python bench/memory_budget.py --gpu-gib 139      # another GPU
    python bench/memory_budget.py --judge-params 30e9

Weights are counted on the models' own configurations (bench/random_vlm), without loading anything.
Not counted: activations of a micro-batch, buffers of NCCL and CUDA's own memory (about 1 GiB for
each process on the GPU; a sleeping engine keeps its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
import torch
from transformers import AutoModelForImageTextToText

from speciarl.bench.random_vlm import random_config
from speciarl.core.lora import add_lora

GIB = 2**30
BF16, FP32 = 2, 4
SETUPS = (  # GPUs, words, LoRA rank (0: every weight), share of free memory for the engine
    ("qwen2.5-vl-3b", 1, "1 GPU", 64, 0.6),
    ("qwen2.5-vl-3b", 8, "8 GPUs", 0, 0.7),
    ("qwen2.5-vl-7b", 1, "1 GPU", 64, 0.5),
    ("qwen2.5-vl-7b", 4, "4 GPUs", 64, 0.7),
    ("qwen2.5-vl-7b", 8, "8 GPUs", 64, 0.7),
    ("qwen2.5-vl-7b", 8, "8 GPUs", 0, 0.6),
    ("qwen2.5-vl-7b", 16, "2 nodes of 8", 0, 0.7),
)


@dataclass(frozen=True)
class Model:
    """Sizes of a model: parameters, those that train (adapters, or the language model), and bytes
    of keys and values a token in bf16."""

    parameters: int
    trained: int
    kv_bytes: int


def model_of(size: str, lora_rank: int) -> Model:
    """Counted on the "meta" device."""
    config: Any = random_config(size)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
        parameters = sum(p.numel() for p in model.parameters())
        if lora_rank:
            add_lora(model, lora_rank, 2.0 * lora_rank, 0)
        else:
            model.model.visual.requires_grad_(False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * width * BF16
    return Model(parameters, trained, kv)


def row(
    size: str, gpus: int, words: str, rank: int, memory: float, gpu: float, judge: float
) -> str:
    """A line of the table; gpu: GiB free on an empty GPU; judge: GiB of its weights."""
    model = model_of(size, rank)
    frozen = model.parameters if rank else model.parameters - model.trained
    stored = frozen * (BF16 if rank else FP32) + model.trained * FP32
    rest = (stored + model.trained * 2 * FP32) / gpus / GIB  # with Adam's moments
    learning = rest + model.trained * FP32 / gpus / GIB
    engine = memory * gpu
    weights = model.parameters * BF16 / GIB
    tokens = (engine - weights) * GIB / model.kv_bytes
    left = gpu - rest - engine
    what = f"LoRA r {rank}" if rank else "language model"
    cells = [
        words, what, f"{memory:g}", f"{rest:.1f}", f"{weights:.1f}",
        f"{engine - weights:.1f} = {tokens / 1000:,.0f} k tokens", f"{left:.1f}",
        f"{gpu - learning:.1f}", f"{gpu - rest - judge:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.option("--gpu-gib", default=78.0, show_default=True, help="Free on an empty GPU.")
@click.option("--judge-params", default=4e9, show_default=True, help="Of a judge in bf16.")
def main(gpu_gib: float, judge_params: float) -> None:
    """GiB a GPU, for the released sizes of Qwen2.5-VL."""
    judge = judge_params * BF16 / GIB
    for size in dict.fromkeys(setup[0] for setup in SETUPS):
        model = model_of(size, 0)
        click.echo(
            f"\n{size}: {model.parameters / 1e9:.2f} B parameters, {model.kv_bytes // 1024} KiB of "
            f"keys and values a token; {gpu_gib:g} GiB free on an empty GPU\n"
        )
        head = ("GPUs", "trained", "rollout.memory", "trainer at rest", "engine: weights",
                "engine: keys and values", "left while it generates", "left for a micro-batch",
                f"left for a judge beyond its {judge:.1f}")  # fmt: skip
        click.echo("| " + " | ".join(head) + " |")
        click.echo("|" + "---|" * len(head))
        for setup in SETUPS:
            if setup[0] == size:
                click.echo(row(*setup, gpu_gib, judge))


if __name__ == "__main__":
    main()
