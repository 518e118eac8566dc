"""Weight pushes from the sharded policy into a rollout engine: time, bytes, sleep, mismatch.

    python bench/push.py --engine sglang --bucket-mb 1
    torchrun --nproc-per-node 2 bench/push.py --engine native
    python bench/push.py --engine sglang --model-config qwen2.5-vl-7b --json push.json   # a GPU

A push is taken apart: gathering the shards into whole weights (measured alone, too, with nobody who
takes them), and what the engine needs to take them. After each push the engine samples, and the
policy scores the same tokens. On a GPU the engine sleeps between pushes, as in training, and the
device's free memory is read before and after.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from speciarl.bench.random_vlm import save_random
from speciarl.bench.rollout_work import TOYBASE, build_prompts
from speciarl.bench.timing import environment
from speciarl.core.batch import Item, pack
from speciarl.core.config import Config
from speciarl.core.parts import open_engine
from speciarl.core.policy import Policy
from speciarl.core.prompts import PromptBuilder
from speciarl.core.settings import load
from speciarl.core.toymodel import TOY_INSTRUCTION
from speciarl.core.world import World, init_world, leave_world
from speciarl.rollout.engine import Request, Rollout, RolloutEngine, Sampling

Figures = dict[str, float]


def timed(work: Callable[[], object], world: World) -> float:
    """Seconds until every rank and the device have done it."""
    world.barrier()
    start = time.perf_counter()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    return time.perf_counter() - start


def free_memory(world: World) -> float:
    """GiB free on this rank's GPU; 0 without one."""
    if world.device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**30


def gather(policy: Policy) -> int:
    """Produces every weight and lets go of it; returns their bytes."""
    return sum(weight.nbytes for _, weight in policy.named_weights())


def mismatch(policy: Policy, rollouts: Sequence[Rollout], temperature: float) -> Figures:
    """|engine - trainer| of the completions' log-probs, nats a token."""
    found: list[Tensor] = []
    for start in range(0, len(rollouts), 16):
        part = rollouts[start : start + 16]
        items = [Item(rollout.prompt, rollout.ids) for rollout in part]
        batch = pack(items, policy.image_token_id, policy.world.device)
        with torch.no_grad():
            scored = policy.logprobs(batch, temperature=temperature)
        engine = torch.tensor([x for rollout in part for x in rollout.logprobs])
        found.append((scored.float().cpu() - engine).abs())
    apart = torch.cat(found)
    return {"mismatch_mean": float(apart.mean()), "mismatch_max": float(apart.max())}


def one_round(
    engine: RolloutEngine, policy: Policy, requests: Sequence[Request], version: int, most: int
) -> Figures:
    """Sleep, gather, push, sample."""
    world, found = policy.world, {}
    awake = free_memory(world)
    found["sleep_s"] = timed(engine.sleep, world)
    found["freed_gib"] = free_memory(world) - awake
    found["gather_s"] = timed(lambda: gather(policy), world)
    found["wake_s"] = timed(engine.wake, world)
    found["push_s"] = timed(
        lambda: engine.load_weights(policy.named_weights(), version=version), world
    )
    sampling = Sampling(max_new_tokens=most, step=version)
    rollouts: list[Rollout] = []

    def sample() -> None:
        for group in engine.generate(requests, sampling):
            rollouts.extend(group.rollouts)

    found["generate_s"] = timed(sample, world)
    assert {rollout.weight_version for rollout in rollouts} == {version}
    return {**found, **mismatch(policy, rollouts, sampling.temperature)}


def measure(config: Config, world: World, repeats: int, prompts: int, samples: int) -> Any:
    """Rounds of one engine, after one that warms up."""
    builder = PromptBuilder(config.model.folder, instruction=config.data.instruction)
    requests = [
        Request(prompt, f"{i}", tuple(range(samples)))
        for i, prompt in enumerate(build_prompts(builder, prompts))
    ]
    engine = open_engine(config, world, builder, keep_weights=False)
    try:
        engine.sleep()
        policy = Policy(config.model, world, tuple(builder.banned_ids), reference=False)
        engine.load_weights(policy.named_weights(), version=0)
        most = config.rollout.max_new_tokens
        rounds = [one_round(engine, policy, requests, i, most) for i in range(repeats + 1)][1:]
        return {"bytes": gather(policy), "rounds": rounds}
    finally:
        engine.close()


def show(result: dict[str, Any]) -> None:
    """Median and range of each figure."""
    click.echo(f"{result['bytes'] / 2**20:.1f} MiB of weights")
    for name in result["rounds"][0]:
        values = [one[name] for one in result["rounds"]]
        low, high = min(values), max(values)
        click.echo(f"{name:16}{statistics.median(values):12.3g} [{low:.3g}, {high:.3g}]")


@click.command()
@click.option("--engine", default="sglang", show_default=True, help="native or sglang.")
@click.option("--model-config", default="", help="Random weights of that size; else the toy base.")
@click.option("--image-tokens", default=256, show_default=True, help="Of random models.")
@click.option("--bucket-mb", default=512, show_default=True)
@click.option("--prompts", default=8, show_default=True)
@click.option("--samples", default=8, show_default=True, help="Completions of each prompt.")
@click.option("--max-new-tokens", default=32, show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--set", "sets", multiple=True, help="section.key=value of a run; repeat.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    engine: str,
    model_config: str,
    image_tokens: int,
    bucket_mb: int,
    prompts: int,
    samples: int,
    max_new_tokens: int,
    repeats: int,
    sets: tuple[str, ...],
    file: Path | None,
) -> None:
    """Push weights into a rollout engine, as after every training step."""
    world = init_world()
    with ExitStack() as stack:
        model = TOYBASE
        if model_config:
            made = stack.enter_context(tempfile.TemporaryDirectory()) if world.main else ""
            model = Path(world.gather(made)[0], "model")
            world.first(
                lambda: (
                    model.exists() or save_random(model, model_config, image_tokens, world.device)
                )
            )
        words = (
            f"rollout.engine={engine}", f"rollout.bucket_mb={bucket_mb}", f"model.path={model}",
            f"rollout.max_new_tokens={max_new_tokens}", f"data.instruction={TOY_INSTRUCTION}",
            "rollout.sleep=true",
        )  # fmt: skip
        config = load(Config, [], [*words, *sets])
        result = measure(config, world, repeats, prompts, samples)
        stack.callback(leave_world)
    if not world.main:
        return
    show(result)
    if file is not None:
        about = environment("cuda" if world.device.type == "cuda" else "cpu")
        record = {
            "engine": engine, "ranks": world.size, "model": model_config or "toy base",
            "bucket_mb": bucket_mb, "settings": list(sets), "environment": about, **result,
        }  # fmt: skip
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
