"""Rollout engines against transformers' `generate(num_return_sequences=N)` on the same work.

    OMP_NUM_THREADS=2 python bench/rollout.py [--model DIR] [--fixed-length]
    OMP_NUM_THREADS=2 python bench/rollout.py --engines native,sglang,sglang-no-prefix,generate
    python bench/rollout.py --model-config qwen2.5-vl-7b --device cuda --dtype bfloat16 \
        --engines native,sglang,generate --prompts 64 --max-new-tokens 512 --fixed-length

All sample N completions of the same image prompts with the same weights, dtype, threads, stop
tokens and suppressed tokens; runs alternate, and ratios are taken run by run. The engines also
return log-probs; `generate` is not asked for them. Every step begins as a training step does:
nothing is left of the prompts of the step before. "sglang-primed" lets each prompt pass once before
its samples are asked for, "sglang-no-prefix" has no prefix cache; "cached" is the share of the
samples' prompt tokens that were found there. Without --model or --model-config it takes the toy
base policy that ships with the package.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from transformers import AutoModelForImageTextToText

from speciarl.bench.random_vlm import save_random
from speciarl.bench.rollout_work import TOYBASE, Run, Work, build_prompts, engine_run, generate_run
from speciarl.core.prompts import PromptBuilder
from speciarl.core.toymodel import TOY_INSTRUCTION
from speciarl.rollout.native import NativeEngine

CONTENDERS = ("native", "sglang", "sglang-primed", "sglang-no-prefix", "generate")
Runner = Callable[[int], Run]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):9.1f} [{min(values):.1f}, {max(values):.1f}]"


def ratios(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """Of each other contender: how many times the seconds of the first it took, run by run."""
    first, *others = runs
    return {
        name: [b.seconds / a.seconds for a, b in zip(runs[first], runs[name], strict=True)]
        for name in others
    }


def report(runs: dict[str, list[Run]], work: Work, title: str) -> dict[str, Any]:
    """Prints the table; returns it with every run."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if work.device.startswith("cuda") else "cpu"
    click.echo(f"{title}; {machine}, {device}; torch {torch.__version__}, transformers "
               f"{transformers.__version__}")  # fmt: skip
    click.echo(", ".join(f"{name} {value}" for name, value in asdict(work).items()))
    columns = f"{'samples/s':>26}{'tokens/s':>34}{'tokens/sample':>16}{'cached':>9}"
    click.echo(f"{'median [min, max]':20}{columns}")
    for name, done in runs.items():
        samples = spread([run.samples / run.seconds for run in done])
        tokens = spread([run.tokens / run.seconds for run in done])
        mean = sum(run.tokens for run in done) / sum(run.samples for run in done)
        found = statistics.median(run.cached for run in done)
        click.echo(
            f"{name:20}{samples:>26}{tokens:>34}{mean:16.1f}" + (f"{found:9.0%}" if found else "")
        )
    apart = ratios(runs)
    for name, values in apart.items():
        click.echo(f"{next(iter(runs)) + ' / ' + name:32}{spread(values):>26}")
    return {
        "title": title,
        "machine": machine,
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "work": asdict(work),
        "runs": {name: [asdict(run) for run in done] for name, done in runs.items()},
        "ratios": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in apart.items()
        },
    }


class Contenders:
    """Whoever samples, by name, until `close`.

    memory: share of the free GPU memory that each SGLang engine may take.
    """

    def __init__(self, folder: Path, instruction: str, work: Work, memory: float) -> None:
        self.folder, self.work, self.memory = folder, work, memory
        self.builder = PromptBuilder(folder, instruction=instruction)
        self.prompts = build_prompts(self.builder, work.prompts)
        self.stops = [] if work.fixed_length else self.builder.stop_ids
        self.opened = ExitStack()

    def runner(self, name: str) -> Runner:
        """One run of a contender in `CONTENDERS`."""
        if name == "generate":
            model, banned = self._model(), self.builder.banned_ids
            return generate_run(model, self.prompts, self.stops, banned, self.work)
        if name == "native":
            rows = max(256, self.work.prompts * self.work.samples)
            engine = NativeEngine(
                self._model(), stop_ids=self.stops, banned_ids=self.builder.banned_ids,
                max_rows=rows,
            )  # fmt: skip
            return engine_run(engine, self.prompts, self.work)
        return self._sglang(prefix=name != "sglang-no-prefix", primes=name == "sglang-primed")

    def _model(self) -> Any:
        dtype = getattr(torch, self.work.dtype)
        model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype)
        return model.to(self.work.device).eval()

    def _sglang(self, *, prefix: bool, primes: bool) -> Runner:
        from speciarl.rollout.sglang import SglangEngine, rollout_launch

        work = self.work
        longest = max(len(prompt.input_ids) for prompt in self.prompts) + work.max_new_tokens
        launch = rollout_launch(
            self.folder, "cuda" if work.device.startswith("cuda") else "cpu", dtype=work.dtype,
            memory=self.memory, most_requests=max(256, work.prompts * work.samples),
            arguments={"disable_radix_cache": not prefix},
        )  # fmt: skip
        engine = SglangEngine(
            launch, stop_ids=self.stops, banned_ids=self.builder.banned_ids,
            decode=self.builder.decode, longest=longest, primes=primes,
        )  # fmt: skip
        self.opened.callback(engine.close)
        run = engine_run(engine, self.prompts, work)

        def from_scratch(step: int) -> Run:
            engine.forget()
            before = engine.cached_tokens, engine.prompt_tokens
            done = run(step)
            cached, prompts = engine.cached_tokens - before[0], engine.prompt_tokens - before[1]
            return replace(done, cached=cached / prompts)

        return from_scratch


def measure(
    folder: Path, instruction: str, work: Work, names: Sequence[str], memory: float = 0.3
) -> dict[str, list[Run]]:
    """Alternating runs of the contenders with the weights in `folder`."""
    contenders = Contenders(folder, instruction, work, memory)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with contenders.opened:
        runners = {name: contenders.runner(name) for name in names}
        for step in range(work.repeats + 1):
            for name, run in runners.items():
                done = run(step)
                if step > 0:  # the first is a warm-up
                    runs[name].append(done)
    return runs


def _chosen(context: click.Context, option: click.Parameter, names: str) -> list[str]:
    unknown = [name for name in names.split(",") if name not in CONTENDERS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: of {', '.join(CONTENDERS)}")
    return names.split(",")


@click.command()
@click.option("--model", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model-config", default="", help="Random weights of that size (bench/random_vlm).")
@click.option("--image-tokens", default=256, show_default=True, help="Of random models.")
@click.option("--instruction", default=TOY_INSTRUCTION, show_default=True, help="In the prompt.")
@click.option(
    "--engines", default="native,generate", show_default=True, callback=_chosen,
    help=f"Comma-separated, of {', '.join(CONTENDERS)}; ratios are to the first.",
)  # fmt: skip
@click.option("--prompts", default=16, show_default=True)
@click.option("--samples", default=10, show_default=True, help="Completions of each prompt.")
@click.option("--max-new-tokens", default=32, show_default=True)
@click.option("--fixed-length", is_flag=True, help="Ignore the stop tokens everywhere.")
@click.option("--repeats", default=7, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--memory", default=0.3, show_default=True, help="GPU share of an SGLang engine.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    folder: Path | None,
    model_config: str,
    image_tokens: int,
    instruction: str,
    engines: list[str],
    memory: float,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Samples per second of rollout engines and of generate, side by side."""
    transformers.utils.logging.disable_progress_bar()
    work = Work(**options)
    with ExitStack() as stack:
        title = f"model {folder}"
        if model_config:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = save_random(scratch, model_config, image_tokens, torch.device(work.device))
            title = f"{model_config}, random weights"
        elif folder is None:
            folder, title = TOYBASE, "toy base policy"
        runs = measure(folder, instruction, work, engines, memory)
        result = report(runs, work, title)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
