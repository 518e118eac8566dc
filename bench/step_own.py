"""Our training step, taken apart: the real Trainer with a clock in its hands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from speciarl.bench.step_meter import Meter, StepRecord
from speciarl.core.batch import Item, pack
from speciarl.core.collect import Collector, JudgedGroup, Timing
from speciarl.core.config import Config
from speciarl.core.learner import Learned
from speciarl.core.parts import Parts, build
from speciarl.core.policy import Policy
from speciarl.core.stream import PromptStore, PromptStream
from speciarl.core.trainer import Trainer
from speciarl.core.world import World
from speciarl.kernels.codes import S, W


class AlternatingCollector(Collector):
    """Judges as ever, then calls every second completion right.

    Random weights never answer, and groups without signal would cost no learning.
    """

    def _judged(self, *given: Any) -> list[JudgedGroup]:
        return [
            replace(
                group,
                completions=[
                    replace(c, code=(W, S)[index % 2]) for index, c in enumerate(group.completions)
                ],
            )
            for group in super()._judged(*given)
        ]


class _Noted(Trainer):
    """Keeps what the trainer reports of its last step."""

    def note(
        self,
        groups: list[JudgedGroup],
        learned: Learned | None,
        timing: Timing,
        times: dict[str, float],
    ) -> None:
        self.noted = groups, learned, times
        super().note(groups, learned, timing, times)


class OwnStep:
    """The trainer of a configuration, one measured step at a time.

    Args:
        config: a whole run; its `train.out` gets the usual files.
        answers: the policy can answer; otherwise verdicts are made up.
    """

    def __init__(self, config: Config, world: World, *, answers: bool = True) -> None:
        self.world = world
        self.answers = answers
        self.parts: Parts = build(config, world, quiet=True)
        parts = self.parts
        if not answers:
            parts.collector.close()
            parts.collector = AlternatingCollector(
                parts.engine,
                parts.collector.judge,
                parts.builder,
                config.judge,
                timeline=parts.timeline,
            )
        self.trainer = _Noted(config, world, parts)
        self.meter = Meter()
        self._watch()
        self.trainer.push()

    def _watch(self) -> None:
        parts, meter = self.parts, self.meter
        learner: Any = parts.learner
        meter.watch_model(parts.engine.model, samples=True)  # type: ignore[attr-defined]
        meter.watch_model(parts.policy.hf, samples=False)
        if parts.policy.frozen is not None:
            meter.watch_model(parts.policy.frozen.model, samples=False)
        stream: Any = parts.stream
        stream.draw = meter.timed("prompts", stream.draw)
        learner._pack = meter.timed("pack", learner._pack)
        learner._reference = meter.timed("reference", learner._reference)
        policy: Any = parts.policy
        policy.logprobs = meter.timed("policy forward", policy.logprobs)
        tensor: Any = torch.Tensor
        tensor.backward = meter.timed("backward", tensor.backward)
        optimizer: Any = parts.optimizer
        optimizer.step = meter.timed("optimizer", optimizer.step)

    def step(self) -> StepRecord:
        """One training step of this rank."""
        self.meter.start()
        self.trainer.step()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = self.meter.elapsed()
        groups, learned, times = self.trainer.noted
        parts = {name.removeprefix("time/"): value for name, value in times.items()}
        completions = [c for group in groups for c in group.completions]
        return StepRecord.of(
            {**parts, "step": seconds},
            self.meter,
            samples=len(completions),
            completion_tokens=sum(len(c.ids) for c in completions),
            learn_tokens=learned.tokens if learned else 0,
        )

    def profile(self, file: Path) -> str:
        """One step more, its trace in Chrome's format written to `file` by rank 0.

        Returns the twenty operations that took longest, as a table.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as trace:
            self.step()
        if self.world.main:
            trace.export_chrome_trace(str(file))
        order = f"self_{self.world.device.type}_time_total"
        return str(trace.key_averages().table(sort_by=order, row_limit=20))

    def close(self) -> None:
        """Closes the parts."""
        self.parts.close()

    def packing_error(self, count: int = 6) -> dict[str, float]:
        """Largest |log-prob difference|, nats, between a packed row and each sequence alone.

        Two completions of `count` prompts of the last step, of other lengths and images, scored
        in one row; then alone on the same attention route, and alone on "sdpa". Beside it the
        whole step's largest difference between trainer and engine. Collective.
        """
        groups, learned, _ = self.trainer.noted
        policy = self.parts.policy
        items = [
            Item(self.parts.data.store.need(group.example), completion.ids)
            for group in groups[:count]
            for completion in group.completions[:2]
        ]
        temperature = self.parts.config.rollout.temperature
        with torch.no_grad():
            packed = _score(policy, [items], temperature)
            alone = _score(policy, [[item] for item in items], temperature)
            route, policy.net.route = policy.net.route, "sdpa"
            plain = _score(policy, [[item] for item in items], temperature)
            policy.net.route = route
        return {
            "packed - alone": _apart(packed, alone),
            "packed - alone on sdpa": _apart(packed, plain),
            "trainer - engine": float(learned.stats[-1]) if learned else float("nan"),
        }


def _score(policy: Policy, rows: Sequence[Sequence[Item]], temperature: float) -> torch.Tensor:
    packed = [pack(row, policy.image_token_id, policy.world.device) for row in rows]
    return torch.cat([policy.logprobs(b, temperature=temperature).float().cpu() for b in packed])


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def drawn_prompts(step: OwnStep, count: int) -> list[dict[str, Any]]:
    """The first `count` prompts that training will draw: key, image, truth and token ids.

    Built apart from the trainer's own store, which stays as cold as a peer's.
    """
    parts, config = step.parts, step.parts.config
    store = PromptStore(parts.builder, 1)
    batch = config.train.prompts if config.data.drop_last else 1
    stream = PromptStream(parts.data.train, store, step.world, config.train.seed, batch)
    out = []
    for example in stream.draw(count):
        prompt = store.get(example)
        assert prompt is not None
        out.append(
            {
                "key": example.key,
                "image": str(example.image.resolve()),
                "truth": example.truth,
                "ids": prompt.input_ids.tolist(),
            }
        )
    return out
