"""A full training step: seconds per part, tokens per second, MFU, memory; beside it TRL's.

    OMP_NUM_THREADS=2 python bench/step.py

Ours is the real Trainer on the toy world. Where TRL is installed, its GRPOTrainer does the same
work in a process of its own, and the two take turns, a step each (what is made equal is said in
bench/peer_trl.py). On a GPU, --model-config builds a released size of Qwen2.5-VL with random
weights instead, and the packed forward is compared with the unpacked one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from speciarl.bench.flop_count import ModelSize, learn_flops, peak_of
from speciarl.bench.random_vlm import SIZES, save_random
from speciarl.bench.step_meter import StepRecord, peak_memory
from speciarl.bench.step_own import OwnStep, drawn_prompts
from speciarl.bench.step_report import print_report, ratios
from speciarl.core.config import Config, load_config
from speciarl.core.prompts import QUESTIONS
from speciarl.core.world import World, init_world, leave_world

WARM_UP = 2
NO_TRL = "TRL is not installed, so only ours is measured: pip install 'speciarl[peers]'"


class Peer:
    """TRL in a process of its own, which rests until asked for a step.

    Raises click.ClickException, with the end of its output, when it dies.
    """

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.log = folder / "peer.log"
        kept = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        )
        env = {name: value for name, value in os.environ.items() if name not in kept}
        env |= {"OMP_NUM_THREADS": str(job["threads"]), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("peer_trl.py"))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
            )
        self.memory = 0
        self._tell(json.dumps(job))
        self._hear()

    def step(self) -> StepRecord:
        """One step of TRL's trainer."""
        self._tell("")
        answer = self._hear()
        self.memory = answer["memory"]
        return StepRecord(**answer["record"])

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"TRL's process ended:\n{self.log.read_text()[-3000:]}")
        return dict(json.loads(line))


def peer_job(config: Config, own: OwnStep, steps: int, micro_batch: int) -> dict[str, Any]:
    """What the peer must know to do the same work."""
    objective, optim = config.objective, config.optim
    rows = config.train.prompts * config.rollout.n
    return {
        "model": config.model.folder,
        "prompts": drawn_prompts(own, steps * config.train.prompts),
        "text": f"{QUESTIONS[config.data.variant]} {config.data.instruction}".strip(),
        "prompts_per_step": config.train.prompts,
        "micro_batch": micro_batch or rows,
        "n": config.rollout.n,
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "banned": own.parts.builder.banned_ids,
        "beta": objective.loss.kl_coef,
        "clip_low": objective.loss.clip_low,
        "clip_high": objective.loss.clip_high,
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "grad_clip": optim.grad_clip,
        "judge": config.judge.kind,
        "taxonomy": sorted({t.taxonomy for t in config.data.train.values() if t.taxonomy}),
        "reward": asdict(config.reward),
        "steps": steps,
        "seed": config.train.seed,
        "threads": torch.get_num_threads(),
        "device": own.world.device.type,
    }


def configure(size: str, lora: bool, folder: Path, model: str, image_tokens: int,
              sets: tuple[str, ...]) -> Config:  # fmt: skip
    """The toy world's preset, changed for the bench, for a random model, and by --set."""
    ours = [f"train.out={folder / 'run'}", "optim.lr=1e-6", f"model.path={model}"]
    if size:
        ours += [
            f"data.max_prompt_tokens={2 * image_tokens + 64}",
            "model.reshard_after_forward=true",
        ]
        ours += ["model.checkpoint_activations=true", "model.freeze_vision=true"]
        ours += ["rollout.max_new_tokens=256", "train.token_budget=16384", "evaluation.every=0"]
        ours += ["model.lora_rank=64"] if lora else []
    return load_config("toyworld", None, (*ours, *sets))


def measure(
    own: OwnStep, peer: Peer | None, steps: int
) -> tuple[dict[str, list[StepRecord]], dict[str, int]]:
    """Records of `steps` steps of each after the warm-up, in turns; and peak bytes of each."""
    records: dict[str, list[StepRecord]] = {name: [] for name in ("ours", "TRL")[: 1 + bool(peer)]}
    for index in range(WARM_UP + steps):
        if index == WARM_UP and own.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        done = {"ours": own.step()} | ({"TRL": peer.step()} if peer else {})
        for name, record in done.items() if index >= WARM_UP else ():
            records[name].append(record)
    memory = {"ours": peak_memory(own.world.device)} | ({"TRL": peer.memory} if peer else {})
    return records, memory


def utilisation(config: Config, own: OwnStep, records: list[StepRecord]) -> dict[str, float] | None:
    """Median MFU of learning, and of the step as a whole; None where the peak is not known."""
    if own.world.device.type != "cuda":
        return None
    peak = peak_of(torch.cuda.get_device_name(own.world.device))
    if peak is None:
        return None
    size = ModelSize.of(own.parts.policy.hf)
    how = {"lora": config.model.lora_rank > 0, "freeze_vision": config.model.freeze_vision}
    shares = []
    for record in records:
        work = {**record.work, "predicted": record.completion_tokens // own.world.size}
        flops = learn_flops(size, work, **how)
        shares.append((flops / record.parts["learn"] / peak, flops / record.parts["step"] / peak))
    middle = sorted(shares)[len(shares) // 2]
    return {"learn": middle[0], "step": middle[1], "peak_flops": peak}


def machine(world: World) -> dict[str, Any]:
    """Where it ran, without the machine's name."""
    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "ranks": world.size,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"trl": importlib.metadata.version("trl")} if importlib.util.find_spec("trl") else {}),
    }


EXAMPLES = """\b
Examples:
  OMP_NUM_THREADS=2 python bench/step.py --steps 9 --json step.json
  python bench/step.py --no-peer --profile trace.json
  python bench/step.py --model-config tiny --lora --image-tokens 16
  python bench/step.py --model-config qwen2.5-vl-7b --lora --steps 3 --json 7b-lora.json
  torchrun --nproc-per-node 8 bench/step.py --model-config qwen2.5-vl-7b --full --steps 3"""


def installed(wanted: bool, size: str) -> bool:
    """Whether TRL is to be measured: says so where it is wanted but missing."""
    if wanted and not size and importlib.util.find_spec("trl") is None:
        click.echo(NO_TRL, err=True)
        return False
    return wanted and not size


@click.command(epilog=EXAMPLES)
@click.option("--steps", default=7, show_default=True, help=f"Measured, after {WARM_UP} warm-ups.")
@click.option("--model", default="toy", show_default=True, help='Checkpoint folder, or "toy".')
@click.option("--model-config", "size", default="", type=click.Choice(["", *SIZES]),
              help="Random weights of this size instead; no peer.")  # fmt: skip
@click.option("--lora/--full", default=False, help="With --model-config: what is trained.")
@click.option("--image-tokens", default=256, show_default=True,
              help="With --model-config: least tokens of an image.")  # fmt: skip
@click.option("--peer/--no-peer", "with_peer", default=True, help="Measure TRL too, if installed.")
@click.option("--peer-batch", default=0, help="TRL's completions per forward; 0 is all at once.")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Changes a setting of the run, for both; repeat.")  # fmt: skip
@click.option("--profile", type=click.Path(dir_okay=False, path_type=Path),
              help="Write a torch profiler trace of one more step of ours.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(model: str, size: str, lora: bool, image_tokens: int, with_peer: bool,
         sets: tuple[str, ...], **options: Any) -> None:  # fmt: skip
    """Seconds, speed and memory of a training step, alone or beside TRL's."""
    transformers.utils.logging.disable_progress_bar()
    with_peer = installed(with_peer, size)
    with tempfile.TemporaryDirectory() as name:
        config = configure(size, lora, Path(name), model, image_tokens, sets)
        threads = config.train.threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        world = init_world(threads, config.train.device)
        folder = Path(world.gather(name)[0])
        if size:
            model = str(folder / "model")
            world.first(lambda: Path(model).exists() or save_random(Path(model), size, image_tokens,
                                                                    world.device))  # fmt: skip
        config = configure(size, lora, folder, model, image_tokens, sets)
        own = OwnStep(config, world, answers=not size)
        bench(own, folder, with_peer=with_peer and world.size == 1, title=size or model, **options)
        own.close()
        leave_world()


def bench(own: OwnStep, folder: Path, *, with_peer: bool, title: str, steps: int, peer_batch: int,
          profile: Path | None, json_file: Path | None) -> None:  # fmt: skip
    """Measures, prints and writes."""
    config = own.parts.config
    peer = Peer(peer_job(config, own, WARM_UP + steps, peer_batch), folder) if with_peer else None
    try:
        records, memory = measure(own, peer, steps)
    finally:
        if peer is not None:
            peer.close()
    result: dict[str, Any] = {
        "model": title,
        "trained": "LoRA" if config.model.lora_rank else "full",
        "machine": machine(own.world),
        "memory_bytes": memory,
        "mfu": utilisation(config, own, records["ours"]),
        "attention": own.parts.policy.net.route,
        "packing": own.packing_error() if not own.answers else None,
        "ratio": ratios(records) if peer else None,
        "records": {who: [asdict(r) for r in done] for who, done in records.items()},
    }
    summary = own.profile(profile) if profile is not None else ""
    if own.world.main:
        print_report(result, records)
        if profile is not None:
            click.echo(f"\n{summary}\ntrace: {profile}")
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    check_packing(own, result["packing"] or {})


def check_packing(own: OwnStep, found: dict[str, float]) -> None:
    """Raises click.ClickException where a packed row's log-probs are not those of its sequences.

    bf16 rounds otherwise in other shapes and kernels. Sequences that see each other are much
    further apart: 0.8 nats on the toy base policy.
    """
    allowed = 1e-4 if own.parts.policy.dtype == torch.float32 else 0.2
    wrong = {k: v for k, v in found.items() if k.startswith("packed") and not v <= allowed}
    if wrong:
        raise click.ClickException(f"packed and unpacked differ, {allowed} nats allowed: {wrong}")


if __name__ == "__main__":
    main()
