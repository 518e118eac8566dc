"""Everything a run is made of, put together from the configuration."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speciarl.core.checkpoint import CheckpointStore, check_shared
from speciarl.core.collect import Collector, padded
from speciarl.core.config import Config
from speciarl.core.evaluation import Predictions, evaluate
from speciarl.core.inputs import Data, default_cache, open_data, open_judge
from speciarl.core.learner import Learner
from speciarl.core.metrics import Report, best_of_k, report
from speciarl.core.monitor import Monitor, run_versions
from speciarl.core.optim import Optimizer
from speciarl.core.policy import Policy
from speciarl.core.prompts import PromptBuilder
from speciarl.core.settings import to_dict
from speciarl.core.stream import PromptStream
from speciarl.core.timeline import Timeline
from speciarl.core.world import World
from speciarl.judge.settings import SAME
from speciarl.rollout.engine import RolloutEngine
from speciarl.rollout.registry import Source, make_engine

TELL_EVERY = 30.0  # seconds between signs of life of a long evaluation


def open_engine(
    config: Config, world: World, builder: PromptBuilder, *, keep_weights: bool
) -> RolloutEngine:
    """The rollout engine of this rank, with a copy of the policy's first weights.

    Args:
        keep_weights: sleep must keep them: the engine wakes more often than it gets new ones.
    """
    source = Source(
        folder=config.model.folder,
        dtype=config.model.compute_dtype(world.device),
        device=world.device,
        stop_ids=builder.stop_ids,
        banned_ids=builder.banned_ids,
        longest_prompt=config.data.max_prompt_tokens,
        keep_weights=keep_weights,
        seed=config.train.seed,
        decode=lambda ids: str(builder.tokenizer.decode(ids)),
    )
    return make_engine(config.rollout, source)


@dataclass
class Parts:
    """What the trainer works with."""

    out: Path
    data: Data
    policy: Policy
    optimizer: Optimizer
    learner: Learner
    engine: RolloutEngine
    collector: Collector
    evaluator: Collector
    stream: PromptStream
    store: CheckpointStore
    monitor: Monitor
    timeline: Timeline
    config: Config
    world: World

    @property
    def builder(self) -> PromptBuilder:
        """Processor and tokenizer."""
        return self.data.builder

    def write_record(self) -> None:
        """Settings, versions and the judges' identities, in the run folder."""
        engine = self.collector.engine.about
        judges = {
            "judge": self.collector.judge.identity,
            "evaluation_judge": self.evaluator.judge.identity,
        }
        self.monitor.write_run_record(versions=run_versions() | judges | {"engine": engine})
        self.monitor.message(f"rollouts: {engine}")

    def evaluate(self, step: int) -> Report:
        """Metrics of the engine's weights on every evaluation set; kept in the run folder."""
        config, folder = self.config.evaluation, self.out / "evaluation" / f"step-{step:06d}"
        if self.world.main:
            shutil.rmtree(folder, ignore_errors=True)
        self.world.barrier()
        rows, skipped = evaluate(
            self.evaluator,
            self.data.store,
            self.data.eval,
            config.sampling(self.config.rollout.max_new_tokens, self.config.rollout.stop_text),
            config.k,
            self.world,
            Predictions(folder, {"step": step, "k": config.k}, self.world),
            self._tell(sum(map(len, self.data.eval.values())) // self.world.size),
        )
        result = report_of(rows, skipped)
        if self.world.main:
            write_metrics(folder, result, skipped)
        return result

    def _tell(self, total: int) -> Callable[[int], None]:
        """Says every half minute how far this rank's evaluation is; a short one says nothing."""
        done, last = 0, time.monotonic()

        def tell(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last > TELL_EVERY:
                last = time.monotonic()
                self.monitor.message(f"evaluated {done} of {total} images")

        return tell

    def export(self) -> Path:
        """The policy with tokenizer and image processor, in HF layout. Collective."""
        folder = self.out / "model"
        export_model(self.policy, self.builder, folder, self.world)
        return folder

    def close(self) -> None:
        """Engine, judge threads and files."""
        self.collector.close()
        self.evaluator.close()
        self.collector.judge.close()
        if self.evaluator.judge is not self.collector.judge:
            self.evaluator.judge.close()
        self.engine.close()
        self.monitor.close()


def report_of(rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> Report:
    """Metrics of prediction rows; of several answers to an image, the best counts."""
    if not rows:
        reason = next(iter(skipped.values()), "")
        raise ValueError(
            "nothing to evaluate: no [data.eval] table has a usable image"
            f"{'; one skipped: ' + reason if reason else ''}"
        )
    codes = best_of_k(padded([row["codes"] for row in rows]))
    return report(codes, [row["dataset"] for row in rows], [row["domain"] for row in rows])


def write_metrics(folder: Path, result: Report, skipped: Mapping[str, str]) -> None:
    """metrics.json beside the predictions."""
    record = {**result.as_dict(), "skipped": dict(skipped)}
    (folder / "metrics.json").write_text(json.dumps(record, indent=1))


def export_model(policy: Policy, builder: PromptBuilder, folder: Path, world: World) -> None:
    """Weights, configuration, tokenizer and image processor in one folder. Collective."""
    policy.save_hf(folder)
    if world.main:
        builder.save(folder)
    world.barrier()


def build(config: Config, world: World, *, supervised: bool = False, quiet: bool = False) -> Parts:
    """All parts of a training run. Fails before loading weights where the input is wrong.

    What shares the policy's device starts before it, one after another, and sleeps then: an engine
    takes a share of the memory that is free when it starts.

    Args:
        supervised: training labels are taught, not judged, and no reference policy is held.
    """
    with ExitStack() as opened:
        parts = _build(config, world, opened, supervised=supervised, quiet=quiet)
        opened.pop_all()
    return parts


def _build(
    config: Config, world: World, opened: ExitStack, *, supervised: bool, quiet: bool
) -> Parts:
    """`opened` closes what was opened, if the rest fails."""
    out = Path(config.train.out)
    if out.is_file():
        raise FileExistsError(f"train.out={config.train.out!r} is a file, not a run folder")
    check_shared(out)
    data = open_data(config, world)
    every = {**config.data.train, **{f"eval.{k}": v for k, v in config.data.eval.items()}}
    asked = data.eval.values() if supervised else (data.train, *data.eval.values())
    truths = [example.truth for part in asked for example in part]
    cache = default_cache(out, world)
    judge = open_judge(config.judge, every, truths, cache)
    opened.callback(judge.close)
    examination = config.evaluation.judged_by(config.judge)
    apart = config.evaluation.judge.kind != SAME
    examiner = open_judge(examination, every, truths, cache) if apart else judge
    if apart:
        opened.callback(examiner.close)
    batch = config.train.prompts if config.data.drop_last else 1
    stream = PromptStream(data.train, data.store, world, config.train.seed, batch)
    stream.require(config.train.prompts)
    in_turn = not (judge.concurrent and examiner.concurrent)
    engine = open_engine(config, world, data.builder, keep_weights=in_turn)
    opened.callback(engine.close)
    if config.rollout.sleeps:
        engine.sleep()
        world.barrier()  # it may have been on other ranks' GPUs
    banned = tuple(data.builder.banned_ids)
    timeline = Timeline()
    reference = bool(config.objective.kl_coef) and not supervised
    policy = Policy(config.model, world, banned, reference=reference, seed=config.train.seed)
    optimizer = Optimizer(config.optim, policy.parameters())
    learner = Learner(
        policy,
        optimizer,
        config.objective,
        config.reward,
        world,
        temperature=config.rollout.temperature,
        limit=config.rollout.max_new_tokens,
        token_budget=config.train.token_budget,
        mini_batch=config.train.mini_batch,
        prompt_of=data.store.need,
        timeline=timeline,
    )
    store = CheckpointStore(out, config.train.keep)
    monitor = open_monitor(config, world, store, quiet=quiet)
    tell = monitor.message
    return Parts(
        out=out,
        data=data,
        policy=policy,
        optimizer=optimizer,
        learner=learner,
        engine=engine,
        collector=Collector(engine, judge, data.builder, config.judge, tell, timeline),
        evaluator=Collector(engine, examiner, data.builder, examination, tell, timeline),
        stream=stream,
        store=store,
        monitor=monitor,
        timeline=timeline,
        config=config,
        world=world,
    )


def open_monitor(
    config: Config, world: World, store: CheckpointStore, *, quiet: bool = False
) -> Monitor:
    """The monitor of a run that goes on from its newest checkpoint."""
    start = store.latest() or 0
    if config.train.resume == "previous" and start:
        start = store.previous(start) or 0
    return Monitor(
        Path(config.train.out),
        rank=world.rank,
        total_steps=config.train.steps,
        config=to_dict(config),
        quiet=quiet,
        start_step=start,
    )
