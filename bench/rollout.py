"""Native engine against transformers' `generate(num_return_sequences=N)` on the same work.

    OMP_NUM_THREADS=2 python bench/rollout.py [--model DIR] [--fixed-length]

Both sample N completions of the same image prompts with the same weights, dtype, threads, stop
tokens and suppressed tokens; runs alternate, and the ratio is taken run by run. The native engine
also returns log-probs; `generate` is not asked for them. Without --model it takes the toy base
policy that ships with the package, or random weights of the same shape where there is none.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, GenerationConfig

import speciarl.core
from speciarl.core.examples import DataTable, load_examples
from speciarl.core.prompts import PromptBuilder
from speciarl.core.toymodel import TOY_INSTRUCTION, save_toymodel
from speciarl.core.toyworld import WorldSpec, ensure_toyworld
from speciarl.rollout.engine import Prompt, Request, Sampling
from speciarl.rollout.native import NativeEngine

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


def build_prompts(builder: PromptBuilder, count: int) -> list[Prompt]:
    """`count` prompts over freshly drawn toy birds of all framings."""
    with tempfile.TemporaryDirectory() as folder:
        world = ensure_toyworld(Path(folder) / "world", WorldSpec(train=2, test=1))
        table = DataTable(format="cub", path=str(world / "birds"), split="all")
        examples = load_examples("birds", table)
        return [builder.build(examples[i % len(examples)]) for i in range(count)]


def native_run(engine: NativeEngine, prompts: Sequence[Prompt], work: Work) -> Callable[[int], Run]:
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


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):9.1f} [{min(values):.1f}, {max(values):.1f}]"


def report(runs: dict[str, list[Run]], work: Work, title: str) -> dict[str, Any]:
    """Prints the table; returns it with every run."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    click.echo(f"{title}; {machine}; torch {torch.__version__}, transformers "
               f"{transformers.__version__}")  # fmt: skip
    click.echo(", ".join(f"{name} {value}" for name, value in asdict(work).items()))
    click.echo(f"{'median [min, max]':20}{'samples/s':>26}{'tokens/s':>34}{'tokens/sample':>16}")
    for name, done in runs.items():
        samples = spread([run.samples / run.seconds for run in done])
        tokens = spread([run.tokens / run.seconds for run in done])
        mean = sum(run.tokens for run in done) / sum(run.samples for run in done)
        click.echo(f"{name:20}{samples:>26}{tokens:>34}{mean:16.1f}")
    pairs = zip(runs["generate"], runs["native"], strict=True)
    ratios = [slow.seconds / fast.seconds for slow, fast in pairs]
    click.echo(f"{'native / generate':20}{spread(ratios):>26}")
    return {
        "title": title,
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "work": asdict(work),
        "runs": {name: [asdict(run) for run in done] for name, done in runs.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def measure(folder: Path, instruction: str, work: Work) -> dict[str, list[Run]]:
    """Alternating runs of both contenders with the weights in `folder`."""
    builder = PromptBuilder(folder, instruction=instruction)
    prompts = build_prompts(builder, work.prompts)
    stops = [] if work.fixed_length else builder.stop_ids
    dtype = getattr(torch, work.dtype)

    def load() -> Any:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        return model.to(work.device).eval()

    engine = NativeEngine(load(), stop_ids=stops, banned_ids=builder.banned_ids)
    contenders = {
        "native": native_run(engine, prompts, work),
        "generate": generate_run(load(), prompts, stops, builder.banned_ids, work),
    }
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for step in range(work.repeats + 1):
        for name, run in contenders.items():
            done = run(step)
            if step > 0:  # the first is a warm-up
                runs[name].append(done)
    return runs


@click.command()
@click.option("--model", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--instruction", default=TOY_INSTRUCTION, show_default=True, help="In the prompt.")
@click.option("--prompts", default=16, show_default=True)
@click.option("--samples", default=10, show_default=True, help="Completions of each prompt.")
@click.option("--max-new-tokens", default=32, show_default=True)
@click.option("--fixed-length", is_flag=True, help="Ignore the stop tokens in both.")
@click.option("--repeats", default=7, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(folder: Path | None, instruction: str, json_file: Path | None, **options: Any) -> None:
    """Samples per second of the native engine and of generate, side by side."""
    transformers.utils.logging.disable_progress_bar()
    work = Work(**options)
    with ExitStack() as stack:
        title = f"model {folder}"
        if folder is None and (TOYBASE / "config.json").is_file():
            folder, title = TOYBASE, "toy base policy"
        elif folder is None:
            folder = save_toymodel(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            title = "toy model, random weights"
        result = report(measure(folder, instruction, work), work, title)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
