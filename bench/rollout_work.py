"""What the rollout contenders do: the same samples of the same image prompts, run by run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

import speciarl.core
from speciarl.core.examples import DataTable, load_examples
from speciarl.core.prompts import PromptBuilder
from speciarl.core.toyworld import WorldSpec, ensure_toyworld
from speciarl.rollout.engine import Prompt, Request, RolloutEngine, Sampling

TOYBASE = Path(speciarl.core.__path__[0]) / "toybase"


@dataclass(frozen=True)
class Work:
    """What both contenders do, `repeats` times after one warm-up."""

    prompts: int
    samples: int
    max_new_tokens: int
    fixed_length: bool
    repeats: int
    dtype: str
    device: str


@dataclass
class Run:
    """One measurement."""

    seconds: float
    samples: int
    tokens: int
    cached: float = 0.0
    """Share of the samples' prompt tokens that an engine's prefix cache had."""


def build_prompts(builder: PromptBuilder, count: int) -> list[Prompt]:
    """`count` prompts over freshly drawn toy birds of all framings."""
    with tempfile.TemporaryDirectory() as folder:
        world = ensure_toyworld(Path(folder) / "world", WorldSpec(train=2, test=1))
        table = DataTable(format="cub", path=str(world / "birds"), split="all")
        examples = load_examples("birds", table)
        return [builder.build(examples[i % len(examples)]) for i in range(count)]


def engine_run(
    engine: RolloutEngine, prompts: Sequence[Prompt], work: Work
) -> Callable[[int], Run]:
    """One run: all groups of one step."""
    requests = [Request(p, str(i), tuple(range(work.samples))) for i, p in enumerate(prompts)]

    def run(step: int) -> Run:
        sampling = Sampling(max_new_tokens=work.max_new_tokens, step=step)
        start = time.perf_counter()
        groups = list(engine.generate(requests, sampling))
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        seconds = time.perf_counter() - start
        return Run(seconds, len(rollouts), sum(len(rollout.ids) for rollout in rollouts))

    return run


def generate_run(
    model: Any, prompts: Sequence[Prompt], stops: list[int], banned: list[int], work: Work
) -> Callable[[int], Run]:
    """One run: the left-padded batch through `generate`, as trainers without an engine do it."""
    placeholder = model.config.image_token_id
    ids = pad_sequence([p.input_ids for p in prompts], batch_first=True, padding_side="left")
    real = [torch.ones_like(p.input_ids) for p in prompts]
    inputs = {
        "input_ids": ids,
        "attention_mask": pad_sequence(real, batch_first=True, padding_side="left"),
        "mm_token_type_ids": (ids == placeholder).int(),
        **{name: torch.cat([p.images[name] for p in prompts]) for name in prompts[0].images},
    }
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        num_return_sequences=work.samples, max_new_tokens=work.max_new_tokens,
        eos_token_id=stops or None, suppress_tokens=banned,
    )  # fmt: skip

    def run(step: int) -> Run:
        torch.manual_seed(step)
        start = time.perf_counter()
        out = model.generate(**inputs)
        new = out[:, ids.shape[1] :].cpu()
        seconds = time.perf_counter() - start
        stopped = torch.isin(new, torch.tensor(stops)).int()
        after_stop = (stopped.cumsum(1) - stopped) > 0
        return Run(seconds, len(new), int((~after_stop).sum()))

    return run
