"""The trainer: generate, judge, score, learn, push; one process per GPU does each in turn."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from speciarl.core.collect import JudgedGroup, Timing
from speciarl.core.config import Config
from speciarl.core.learner import Learned
from speciarl.core.mismatch import MismatchGuard
from speciarl.core.optim import learning_rate
from speciarl.core.parts import Parts
from speciarl.core.report import (
    Deferred,
    changed_settings,
    evaluation_scalars,
    input_rows,
    sample_rows,
    step_scalars,
)
from speciarl.core.rounds import Rounds
from speciarl.core.timeline import Span
from speciarl.core.tracefile import TraceFile
from speciarl.core.verdicts import too_many_faults
from speciarl.core.world import World


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why, and where its inputs were saved."""


@dataclass
class Progress:
    """What a checkpoint must remember besides tensors."""

    step: int = 0
    updates: int = 0
    position: int = 0
    bad_in_a_row: int = 0
    skipped_updates: int = 0
    alarms: int = 0
    skipped_prompts: dict[str, str] = field(default_factory=dict)


class Trainer:
    """Runs the steps of a configuration.

    Args:
        config: the whole configuration.
        world: this process's place in the job.
        parts: model, engine, judge, data and files, already made.
    """

    def __init__(self, config: Config, world: World, parts: Parts) -> None:
        self.config = config
        self.world = world
        self.parts = parts
        self.rounds = Rounds(config, world, parts)
        self.timeline = parts.timeline
        self.trace = TraceFile(parts.out, world, config.train.trace_steps)
        self.progress = Progress()
        self.deferred = Deferred(world.device)
        self.guard = MismatchGuard(config.mismatch)
        self.recent: deque[list[dict[str, Any]]] = deque(maxlen=2)

    def run(self) -> None:
        """From the newest checkpoint, or the start, to the last step and the final model."""
        self.resume()
        self.timeline.step = self.progress.step
        self.trace.start(self.progress.step)
        self.parts.write_record()
        self.push()
        if self.progress.step == 0:
            self.evaluate()
        while self.progress.step < self.config.train.steps:
            self.step()
            # Evaluated before it is saved: what is resumed never lacks its evaluation.
            if self.due(self.config.evaluation.every):
                self.evaluate()
            if self.due(self.config.train.save_every):
                self.save()
            self.trace.add(self.progress.step, self.timeline.take())

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is to be done now."""
        step = self.progress.step
        return step == self.config.train.steps or bool(every and step % every == 0)

    # The step, in the order of its parts.

    def step(self) -> None:
        """One step: generate and judge, score and learn, push the new weights."""
        self.timeline.begin(self.progress.step + 1)
        groups, timing = self.rounds.collect(self.progress.step)
        self.check_versions(groups)
        if problem := too_many_faults(timing.verdicts, self.config.judge.max_fault_share):
            self.save()  # an outage of the judge costs this step, and none before it
            raise TrainingStopped(f"step {self.progress.step}: {problem}")
        self.recent.append(input_rows(self.progress.step, groups))
        self.rest()
        with self.timeline.span("learn") as learning:
            learned = self.parts.learner.learn(groups, self.rate)
            self.settle()
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
        if learned is not None:
            self.progress.updates += len(learned.norms)
        self.progress.step += 1
        self.progress.position = self.parts.stream.position
        pushing = self.push()
        whole, idle = self.timeline.finish()
        times = {
            "time/generate": timing.generate,
            "time/judge": timing.judge,
            "time/learn": learning.seconds,
            "time/push": pushing.seconds,
            "time/step": whole,
            "time/idle": idle,
        }
        self.note(groups, learned, timing, times)

    def rest(self) -> None:
        """The engine leaves its memory to the policy, on every GPU that it is on."""
        if self.config.rollout.sleeps:
            with self.timeline.span("generate", "sleep"):
                self.parts.engine.sleep()
            self.world.barrier()

    def check_versions(self, groups: list[JudgedGroup]) -> None:
        """Refuses completions of other weights than the policy's, before anything is learnt."""
        if problem := self.guard.stale(self.progress.step, groups):
            raise TrainingStopped(problem)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of a full step."""
        return self.config.train.prompts // self.config.train.mini_batch

    def rate(self, update: int) -> float:
        """The learning rate of the step's u-th update."""
        total = self.config.train.steps * self.updates_per_step
        return learning_rate(self.config.optim, max(0, self.progress.updates + update), total)

    def push(self) -> Span:
        """New weights to the engine, stamped with the step that samples from them; the time."""
        with self.timeline.span("push") as pushing:
            self.parts.engine.load_weights(
                self.parts.policy.named_weights(), version=self.progress.step
            )
        return pushing

    # Statistics arrive one step late, so that the host never waits for the device.

    def note(
        self,
        groups: list[JudgedGroup],
        learned: Learned | None,
        timing: Timing,
        times: dict[str, float],
    ) -> None:
        """Hands this step's statistics to the monitor, once the device has them."""
        step, every = self.progress.step, self.config.train.samples_every
        self.list_skipped()
        scalars = step_scalars(self.config, groups, learned, timing, times, self.world)
        scalars["optim/lr"] = self.rate(-1)
        scalars["skipped/prompts"] = float(len(self.progress.skipped_prompts))
        self.deferred.put(step, scalars, learned)
        if every and self.due(every):
            self.parts.monitor.samples(step, sample_rows(groups, self.parts.builder.decode))

    def list_skipped(self) -> None:
        """Shows prompts found to be unusable since the last call, and lists all in a file."""
        known, skipped = self.progress.skipped_prompts, self.parts.stream.skipped
        new = {key: reason for key, reason in skipped.items() if key not in known}
        for key, reason in new.items():
            self.parts.monitor.message(f"skipped {key}: {reason}")
        if new and self.world.main:
            path = self.parts.out / "skipped.json"
            path.write_text(json.dumps(skipped, indent=1, ensure_ascii=False))
        self.progress.skipped_prompts = dict(skipped)

    def settle(self) -> None:
        """Reads the statistics of the step before, logs them, and acts on what they say."""
        if (ready := self.deferred.take()) is None:
            return
        step, scalars, skipped, fault = ready
        for bad in skipped:
            self.progress.skipped_updates += int(bad)
            self.progress.bad_in_a_row = self.progress.bad_in_a_row + 1 if bad else 0
        scalars["skipped/updates"] = float(self.progress.skipped_updates)
        alarm, beyond = self.guard.judge(scalars)
        self.progress.alarms += alarm is not None
        scalars["mismatch/alarms"] = float(self.progress.alarms)
        self.parts.monitor.log(step, scalars)
        if alarm:
            self.parts.monitor.message(f"step {step}: {alarm}")
        if fault:
            self.stop(f"step {step} was learnt from bad input, counted on the device: {fault}")
        if self.progress.bad_in_a_row >= self.config.optim.max_nonfinite:
            rows = f"{self.progress.bad_in_a_row} updates in a row"
            self.stop(f"{rows} had a non-finite gradient, the last in step {step}")
        if beyond:
            self.stop(f"step {step}: {beyond}")

    def stop(self, why: str) -> NoReturn:
        """Ends the run, with what the last two steps learnt from on the disk."""
        raise TrainingStopped(f"{why}; the inputs are in {self.save_inputs()}")

    def save_inputs(self) -> Path:
        """Writes what the last two steps learnt from as JSON."""
        path = self.parts.out / f"stopped-at-step-{self.progress.step}.json"
        if self.world.main:
            path.write_text(json.dumps([row for rows in self.recent for row in rows]))
        return path

    # Checkpoints and evaluation.

    def save(self) -> None:
        """A checkpoint of everything the next step depends on."""
        self.settle()
        with self.timeline.span("save"):
            self.parts.store.save(self.progress.step, self.tensors(), vars(self.progress))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Trainable weights and optimizer state, sharded."""
        weights = {f"policy.{name}": p.data for name, p in self.parts.policy.parameters().items()}
        return weights | self.parts.optimizer.tensors()

    def resume(self) -> None:
        """Loads the checkpoint that `train.resume` asks for, if there is one."""
        store, how = self.parts.store, self.config.train.resume
        found = store.latest()
        if found is not None and how == "never":
            raise FileExistsError(
                f"{self.parts.out} already holds a run (step {found}) and train.resume=never: "
                "choose another train.out, or remove it"
            )
        if found is not None and how == "previous":
            found = store.previous(found)
            if found is None:
                raise FileNotFoundError(f"{store.folder} has no checkpoint before the newest")
        if found is None:
            return
        if found > self.config.train.steps:
            raise ValueError(
                f"{self.parts.out} holds a run of {found} steps, train.steps="
                f"{self.config.train.steps}: raise it, or choose another train.out"
            )
        self.progress = Progress(**store.load(found, self.tensors()))
        self.parts.stream.position = self.progress.position
        self.parts.stream.skipped = dict(self.progress.skipped_prompts)
        self.parts.monitor.message(f"resumed from step {found} of {self.config.train.steps}")
        for change in changed_settings(self.parts.out, self.config):
            self.parts.monitor.message(f"changed since the run was started: {change}")

    def evaluate(self) -> None:
        """Held-out metrics with the current weights, kept with the run."""
        self.settle()
        if not self.parts.data.eval:
            return
        with self.timeline.span("evaluate"):
            metrics = self.parts.evaluate(self.progress.step)
        self.parts.monitor.log(self.progress.step, evaluation_scalars(metrics))
