"""Generate and judge: completions stream from the engine, verdicts are made as groups finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from speciarl.core.adaptive import Spent
from speciarl.core.examples import Example
from speciarl.core.prompts import PromptBuilder
from speciarl.core.timeline import Reporting, Timeline
from speciarl.core.verdicts import Figures, Watch, summed
from speciarl.core.world import World
from speciarl.judge.base import Judge
from speciarl.judge.grading import codes_of
from speciarl.judge.noise import moved
from speciarl.judge.settings import JudgeConfig
from speciarl.kernels.codes import ABSENT
from speciarl.rollout.engine import Group, Prompt, Request, Rollout, RolloutEngine, Sampling
from speciarl.rollout.seeds import uniform_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """One judged sample, light enough to travel between hosts: no prompt, no pixels."""

    ids: list[int]
    logprobs: list[float]
    finish: str
    version: int
    code: int


@dataclass(frozen=True)
class JudgedGroup:
    """All samples of one image, and the length of its prompt in tokens."""

    example: Example
    prompt_tokens: int
    completions: list[Completion]


@dataclass
class Timing:
    """Seconds of this rank, tokens sampled, the figures of the judge (`Watch.figures`), and what
    the rounds of the step spent."""

    generate: float = 0.0
    judge: float = 0.0
    tokens: int = 0
    verdicts: Figures = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    def add(self, other: Timing) -> None:
        """Adds those of a further round."""
        self.generate += other.generate
        self.judge += other.judge
        self.tokens += other.tokens
        self.verdicts = summed([self.verdicts, other.verdicts])
        self.spent += other.spent


Answered = tuple[Example, Group]


class Collector:
    """Turns prompts into judged groups on this rank.

    A concurrent judge grades on worker threads while others are still being generated. One that
    shares the engine's device gets everything in one call after generation, and the engine stays
    asleep until somebody wakes it: this collector, or the push of new weights.

    Args:
        engine: samples the completions.
        judge: grades them.
        builder: decodes token ids.
        config: threads, noise and limit of faults.
        tell: gets a line now and then while grading takes long.
        timeline: gets spans of generating and judging, and the engine's own (`Reporting`).
    """

    def __init__(
        self,
        engine: RolloutEngine,
        judge: Judge,
        builder: PromptBuilder,
        config: JudgeConfig,
        tell: Callable[[str], None] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.engine = engine
        self.judge = judge
        self.builder = builder
        self.config = config
        self.tell = tell
        self.timeline = timeline or Timeline(keep=False)
        if isinstance(engine, Reporting):
            engine.span = self.timeline.span
        self.pool = ThreadPoolExecutor(config.threads, thread_name_prefix="judge")

    def share(self, items: Sequence[T], world: World) -> Sequence[T]:
        """Those of `items`, each of which wants completions of one prompt, that this rank samples;
        the only place that decides it. Of ranks that share an engine only the first has any."""
        return world.part(items, self.engine.ranks)

    def collect(
        self, work: Sequence[tuple[Example, Prompt]], n: int, sampling: Sampling
    ) -> tuple[list[JudgedGroup], Timing]:
        """`n` judged completions of each prompt, see `collect_samples`."""
        return self.collect_samples([(*item, range(n)) for item in work], sampling)

    def collect_samples(
        self, work: Sequence[tuple[Example, Prompt, range]], sampling: Sampling
    ) -> tuple[list[JudgedGroup], Timing]:
        """Judged completions with these sample ids of each prompt, in the order of `work`.

        A group of which the engine gave no completion is left out. `Timing.judge` is what remains
        of judging after the last sample: the rest is hidden.

        Raises:
            RuntimeError: the engine kept a group back, or the judge broke its contract.
        """
        examples = {example.key: example for example, _, _ in work}
        requests = [Request(prompt, example.key, tuple(ids)) for example, prompt, ids in work]
        watch, timing = Watch(self.judge), Timing()
        finished: dict[str, Answered] = {}
        graded: dict[str, Future[list[JudgedGroup]]] = {}
        with self.timeline.span("generate", "wake"):
            self.engine.wake()
        start = time.perf_counter()
        with self.timeline.span("generate", prompts=len(requests)) as generating:
            for group in self.engine.generate(requests, sampling):
                answered = finished[group.group_key] = (examples[group.group_key], group)
                if self.judge.concurrent:
                    job = self.pool.submit(self._judged, [answered], watch, sampling)
                    graded[group.group_key] = job
                timing.tokens += sum(len(r.ids) for r in group.rollouts)
            generating.args["tokens"] = timing.tokens
        timing.generate = time.perf_counter() - start
        lost = [key for key in examples if key not in finished]
        if lost:
            raise RuntimeError(f"the engine ended without {len(lost)} groups, {lost[0]} among them")
        with watch.telling(self.tell, sum(len(ids) for _, _, ids in work)):
            if self.judge.concurrent:
                groups = [group for key in examples for group in graded[key].result()]
            else:
                groups = self._in_turn([finished[key] for key in examples], watch, sampling)
        timing.judge = time.perf_counter() - start - timing.generate
        timing.verdicts = watch.figures()
        return groups, timing

    def _in_turn(
        self, answered: Sequence[Answered], watch: Watch, sampling: Sampling
    ) -> list[JudgedGroup]:
        """All groups in one call, while the engine sleeps; a rank without any wakes no judge, as
        the engine of another may be on its GPU."""
        if not answered:
            return []
        with self.timeline.span("generate", "sleep"):
            self.engine.sleep()
        with self.timeline.span("judge", "wake"):
            self.judge.wake()
        groups = self._judged(answered, watch, sampling)
        with self.timeline.span("judge", "sleep"):
            self.judge.sleep()
        return groups

    def _judged(
        self, answered: Sequence[Answered], judge: Judge, sampling: Sampling
    ) -> list[JudgedGroup]:
        """The groups that have rollouts, with their codes, from one call to the judge."""
        samples = [
            (e, sorted(g.rollouts, key=lambda r: r.sample_id)) for e, g in answered if g.rollouts
        ]
        truths = [example.truth for example, rollouts in samples for _ in rollouts]
        texts = [self.builder.decode(r.ids) for _, rollouts in samples for r in rollouts]
        with self.timeline.span("judge", "grade", completions=len(texts)):
            codes = codes_of(judge, truths, texts)
        if self.config.noise:
            codes = self._noisy(codes, samples, sampling.step)
        given = iter(codes.tolist())
        return [
            JudgedGroup(
                example,
                len(rollouts[0].prompt.input_ids),
                [
                    Completion(r.ids, r.logprobs, r.finish_reason, r.weight_version, next(given))
                    for r in rollouts
                ],
            )
            for example, rollouts in samples
        ]

    def _noisy(
        self, codes: np.ndarray, samples: Sequence[tuple[Example, list[Rollout]]], step: int
    ) -> np.ndarray:
        names = [(f"noise:{e.key}", r.sample_id) for e, rollouts in samples for r in rollouts]
        draws = uniform_rows(self.config.noise_seed, step, names, 2)
        return moved(codes, self.config.noise, draws)

    def close(self) -> None:
        """Stops the worker threads."""
        self.pool.shutdown(cancel_futures=True)


def codes_matrix(groups: Sequence[JudgedGroup]) -> np.ndarray:
    """int8 [G, N] codes, padded with ABSENT where groups differ in size."""
    return padded([[c.code for c in group.completions] for group in groups])


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int8 [G, N] of G rows of codes, filled up with ABSENT to the longest; N is at least 1."""
    codes = np.full((len(rows), max([1, *map(len, rows)])), ABSENT, dtype=np.int8)
    for line, row in zip(codes, rows, strict=True):
        line[: len(row)] = row
    return codes
