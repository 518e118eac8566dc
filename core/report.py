"""From a step's results to the numbers people read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from speciarl.core.collect import JudgedGroup, Timing, codes_matrix
from speciarl.core.config import Config
from speciarl.core.learner import Learned
from speciarl.core.metrics import Report, Tally
from speciarl.core.mismatch import mismatch_scalars
from speciarl.core.monitor import Monitor
from speciarl.core.settings import differences, to_dict
from speciarl.core.verdicts import judge_scalars
from speciarl.core.world import World
from speciarl.kernels import faults
from speciarl.kernels.codes import NAMES
from speciarl.kernels.loss import STATS
from speciarl.kernels.reward import best_of_n_numpy

Scalars = dict[str, float]


class Deferred:
    """Device statistics on their way to the host: put after one step, taken after the next."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.waiting: tuple[int, Scalars, list[torch.Tensor]] | None = None
        self.event: torch.cuda.Event | None = None

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.cuda:
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def put(self, step: int, scalars: Scalars, learned: Learned | None) -> None:
        """Starts the copy of a step's statistics."""
        tensors: list[torch.Tensor] = []
        if learned is not None:
            wanted = (learned.stats, learned.norms, learned.skipped, learned.faults)
            tensors = [self._to_host(tensor) for tensor in wanted]
            if self.cuda:
                self.event = torch.cuda.Event()
                self.event.record()
        self.waiting = (step, scalars, tensors)

    def take(self) -> tuple[int, Scalars, list[bool], str | None] | None:
        """(step, scalars, which updates were skipped, what was wrong) of the step last put, once.

        What was wrong: the message of `kernels.faults`, None if nothing was.
        """
        if self.waiting is None:
            return None
        step, scalars, tensors = self.waiting
        self.waiting = None
        if not tensors:
            return step, scalars, [], None
        if self.event is not None:
            self.event.synchronize()
        stats, norms, skipped, counts = (t.tolist() for t in tensors)
        scalars.update(loss_scalars(dict(zip(STATS, stats, strict=True))))
        scalars["policy/grad_norm"] = sum(norms) / len(norms)
        scalars["policy/clamped"] = float(counts[faults.LOGPROB_CLAMPED])
        return step, scalars, [bool(s) for s in skipped], faults.explain(counts)


def loss_scalars(stats: Scalars) -> Scalars:
    """Means per token from the sums of `kernels.loss.STATS`; a supervised loss has no tokens."""
    if not stats["tokens"]:
        return {"policy/loss": stats["loss"]}
    tokens = stats["tokens"]
    return {
        "policy/loss": stats["loss"],
        "policy/kl": stats["kl_k3"] / tokens,
        "policy/clip_fraction": (stats["clipped_low"] + stats["clipped_high"]) / tokens,
        "policy/dual_clip_fraction": stats["dual_clipped"] / tokens,
        "policy/ratio": stats["ratio"] / tokens,
        "policy/entropy": stats["entropy"] / tokens,
    } | mismatch_scalars(stats)


def step_scalars(
    config: Config,
    groups: Sequence[JudgedGroup],
    learned: Learned | None,
    timing: Timing,
    times: Scalars,
    world: World,
) -> Scalars:
    """What the host knows of a step: times, rates of the categories, rewards, lengths."""
    codes = codes_matrix(groups)
    result = best_of_n_numpy(codes, config.reward, normalize=bool(config.objective.normalize))
    scored = codes >= 0
    completions = [c for group in groups for c in group.completions]
    tokens = sum(world.gather(timing.tokens))
    scalars = dict(times)
    scalars["tokens_per_s/generate"] = tokens / max(times["time/generate"], 1e-9)
    scalars["tokens_per_s/learn"] = (
        learned.tokens / max(times["time/learn"], 1e-9) if learned else 0.0
    )
    scalars["reward/mean"] = float(result.rewards[scored].mean()) if scored.any() else 0.0
    scalars["groups/no_signal"] = float((~result.live).mean())
    scalars["groups/count"] = float(len(groups))
    tally = Tally.of(codes)
    scalars.update({f"rate/{_slug(name)}": rate for name, rate in tally.rates().items()})
    scalars["rate/unscored"] = sum(c.code < 0 for c in completions) / len(completions)
    scalars.update(judge_scalars(timing.verdicts))
    scalars.update(timing.spent.scalars(adaptive=config.rollout.n_start > 0))
    scalars["completions/count"] = float(len(completions))
    scalars["completions/tokens"] = sum(len(c.ids) for c in completions) / len(completions)
    scalars["completions/cut"] = sum(c.finish == "length" for c in completions) / len(completions)
    return scalars


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def evaluation_scalars(result: Report) -> Scalars:
    """Metrics by data set, for the log."""
    scalars = {"eval/mean_hm": result.mean_hm}
    for name, tally in result.datasets.items():
        scalars[f"eval/{name}/correctness"] = tally.correctness
        scalars[f"eval/{name}/specificity"] = tally.specificity
        scalars[f"eval/{name}/hm"] = tally.hm
    return scalars


def sample_rows(
    groups: Sequence[JudgedGroup], decode: Callable[[list[int]], str], most: int = 4
) -> list[dict[str, Any]]:
    """The first groups' completions, readable."""
    return [
        {
            "key": group.example.key,
            "truth": group.example.truth,
            "completions": [
                {"text": decode(c.ids), "category": NAMES[c.code], "finish": c.finish}
                for c in group.completions
            ],
        }
        for group in groups[:most]
    ]


def input_rows(step: int, groups: Sequence[JudgedGroup]) -> list[dict[str, Any]]:
    """What a step learns from, in JSON types."""
    return [
        {
            "step": step,
            "key": group.example.key,
            "truth": group.example.truth,
            "ids": [c.ids for c in group.completions],
            "logprobs": [c.logprobs for c in group.completions],
            "codes": [c.code for c in group.completions],
        }
        for group in groups
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def changed_settings(out: Path, config: Config) -> list[str]:
    """What differs from the settings that the run folder records."""
    record = out / "config.json"
    if not record.exists():
        return []
    now = json.loads(json.dumps(to_dict(config)))
    return differences(json.loads(record.read_text()), now)


def final_table(monitor: Monitor, out: Path, last: int) -> None:
    """Prints base beside trained, per data set, from the run folder's evaluations."""
    files = [out / "evaluation" / f"step-{step:06d}" / "metrics.json" for step in (0, last)]
    if not all(file.exists() for file in files):
        return
    first, final = (json.loads(file.read_text())["datasets"] for file in files)
    rows = []
    for name, after in final.items():
        if name not in first:  # added to the configuration on the way
            continue
        before = first[name]
        cells = [name, str(after["n"])]
        for figure in ("specificity", "correctness", "hm"):
            cells += [_figure(before[figure]), _figure(after[figure])]
        defined = None not in (before["hm"], after["hm"])
        rows.append([*cells, f"{after['hm'] - before['hm']:+.3f}" if defined else "-"])
    columns = ["data set", "images", "spec. base", "trained", "corr. base", "trained"]
    monitor.table(
        f"held-out images, base and after {last} steps",
        [*columns, "HM base", "trained", "gain"],
        rows,
    )
