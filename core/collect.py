"""Generate and judge: completions stream from the engine, verdicts are made as groups finish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from speciarl.core.examples import Example
from speciarl.core.prompts import PromptBuilder
from speciarl.judge.base import Judge
from speciarl.judge.grading import codes_of
from speciarl.rollout.engine import Group, Prompt, Request, RolloutEngine, Sampling


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
    """Seconds of this rank, and tokens sampled."""

    generate: float = 0.0
    judge: float = 0.0
    tokens: int = 0


class Collector:
    """Turns prompts into judged groups on this rank.

    Args:
        engine: samples the completions.
        judge: grades them on worker threads while others are still being generated.
        builder: decodes token ids.
        workers: judge threads.
    """

    def __init__(
        self, engine: RolloutEngine, judge: Judge, builder: PromptBuilder, workers: int
    ) -> None:
        self.engine = engine
        self.judge = judge
        self.builder = builder
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")

    def _grade(self, example: Example, group: Group) -> tuple[JudgedGroup, float]:
        start = time.perf_counter()
        rollouts = sorted(group.rollouts, key=lambda r: r.sample_id)
        texts = [self.builder.decode(r.ids) for r in rollouts]
        codes = codes_of(self.judge, [example.truth] * len(texts), texts)
        completions = [
            Completion(r.ids, r.logprobs, r.finish_reason, r.weight_version, int(code))
            for r, code in zip(rollouts, codes, strict=True)
        ]
        judged = JudgedGroup(example, len(rollouts[0].prompt.input_ids), completions)
        return judged, time.perf_counter() - start

    def collect(
        self, work: Sequence[tuple[Example, Prompt]], n: int, sampling: Sampling
    ) -> tuple[list[JudgedGroup], Timing]:
        """`n` judged completions of each prompt, in the order of `work`.

        `Timing.judge` is what remains of judging after the last sample: the rest is hidden.

        Raises:
            RuntimeError: the engine kept a group back, or the judge broke its contract.
        """
        examples = {example.key: example for example, _ in work}
        requests = [Request(prompt, example.key, tuple(range(n))) for example, prompt in work]
        graded: dict[str, Future[tuple[JudgedGroup, float]]] = {}
        timing = Timing()
        start = time.perf_counter()
        for group in self.engine.generate(requests, sampling):
            example = examples[group.group_key]
            graded[group.group_key] = self.pool.submit(self._grade, example, group)
            timing.tokens += sum(len(r.ids) for r in group.rollouts)
        timing.generate = time.perf_counter() - start
        lost = [example.key for example, _ in work if example.key not in graded]
        if lost:
            raise RuntimeError(f"the engine ended without {len(lost)} groups, {lost[0]} among them")
        done = [graded[example.key].result()[0] for example, _ in work]
        timing.judge = time.perf_counter() - start - timing.generate
        return done, timing

    def close(self) -> None:
        """Stops the worker threads."""
        self.pool.shutdown(cancel_futures=True)


def codes_matrix(groups: Sequence[JudgedGroup]) -> np.ndarray:
    """int8 [G, N] codes, padded with ABSENT (-1) where groups differ in size."""
    width = max(len(group.completions) for group in groups)
    codes = np.full((len(groups), width), -1, dtype=np.int8)
    for row, group in zip(codes, groups, strict=True):
        row[: len(group.completions)] = [c.code for c in group.completions]
    return codes
