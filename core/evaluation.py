"""Evaluation: greedy (or best of k) answers, their verdicts, and the paper's metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speciarl.core.collect import Collector, JudgedGroup
from speciarl.core.examples import Example
from speciarl.core.stream import PromptStore
from speciarl.core.verdicts import Figures, summed, too_many_faults
from speciarl.core.world import World
from speciarl.judge.answers import parse_answer
from speciarl.judge.settings import SAME, JudgeConfig
from speciarl.kernels.codes import ABSENT, NAMES
from speciarl.rollout.engine import Sampling

CHUNK = 64
CHUNK_IN_TURN = 512  # with a judge for which the engine must sleep each time
NO_ANSWER = "the engine gave no completion"


@dataclass(frozen=True)
class EvaluationConfig:
    """How the policy is evaluated, during training and by `core/evaluate.py`."""

    every: int = 40
    """Training steps between evaluations; 0 evaluates only before and after."""
    k: int = 1
    """Answers per image: 1 is greedy; more is the best of k, an oracle."""
    temperature: float = 0.6
    """Sampling temperature of best-of-k."""
    top_p: float = 0.95
    """Nucleus of best-of-k."""
    max_new_tokens: int = 0
    """Length limit of an answer; 0 takes the rollout's."""
    seed: int = 0
    """Of best-of-k sampling."""
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(kind=SAME))
    """Judge of evaluation; kind "same" takes the training judge, without its noise."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.k < 1 or self.max_new_tokens < 0:
            raise ValueError("every and max_new_tokens must not be negative, k at least 1")
        if self.k > 1 and not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError("best of k needs temperature > 0 and 0 < top_p <= 1")
        if self.judge.kind == SAME and self.judge != JudgeConfig(kind=SAME):
            raise ValueError("judge.kind = 'same' takes no other setting of judge: name its kind")

    def sampling(self, limit: int, stop_text: str = "") -> Sampling:
        """Greedy for k = 1, else the oracle's sampling.

        limit, stop_text: the rollout's length and end.
        """
        length = self.max_new_tokens or limit
        if self.k == 1:
            return Sampling(temperature=0.0, max_new_tokens=length, stop_text=stop_text)
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=length,
            stop_text=stop_text,
            seed=self.seed,
        )

    def judged_by(self, training: JudgeConfig) -> JudgeConfig:
        """The judge's settings: without noise where they are those of `training`."""
        return replace(training, noise=0.0) if self.judge.kind == SAME else self.judge


class Predictions:
    """JSON lines in a folder, one file a rank, from which an interrupted evaluation goes on.

    Args:
        folder: where the files lie; made if needed.
        settings: what the predictions depend on.
        world: of the evaluation.

    Raises:
        ValueError: the folder holds predictions made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], world: World) -> None:
        self.folder = folder
        self.path = folder / f"predictions.rank{world.rank}.jsonl"
        world.first(lambda: self._claim(dict(settings)))
        self.rows: dict[str, dict[str, Any]] = {}
        merge(self.rows, self._read())
        world.barrier()

    def _claim(self, settings: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "settings.json"
        if record.exists():
            before = json.loads(record.read_text())
            changed = [k for k in {*before, *settings} if before.get(k) != settings.get(k)]
            if changed:
                raise ValueError(
                    f"{self.folder} holds predictions made with other settings "
                    f"({', '.join(sorted(changed))}): choose another folder or remove it"
                )
            return
        partial = record.with_suffix(".tmp")
        partial.write_text(json.dumps(settings, indent=1))
        partial.replace(record)

    def _read(self) -> Iterator[dict[str, Any]]:
        """Rows of every rank's file; a line cut off by a kill is left out, and done again."""
        for path in sorted(self.folder.glob("predictions.rank*.jsonl")):
            # Bytes: the cut may be inside a character, and text has more line ends than JSON lines.
            for line in path.read_bytes().split(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows, whole lines, to this rank's file."""
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" if cut and self.path.stat().st_size else "")
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.rows.update((row["key"], row) for row in rows)


def judged(row: Mapping[str, Any]) -> bool:
    """Whether every answer of a row of predictions has a verdict."""
    return ABSENT not in row["codes"]


def merge(rows: dict[str, dict[str, Any]], more: Iterable[dict[str, Any]]) -> None:
    """Adds rows to those known by key; one with all its verdicts is never replaced."""
    for row in more:
        if row["key"] not in rows or not judged(rows[row["key"]]):
            rows[row["key"]] = row


def _row(group: JudgedGroup, texts: Sequence[str]) -> dict[str, Any]:
    example = group.example
    return {
        "key": example.key,
        "dataset": example.dataset,
        "domain": example.domain,
        "truth": example.truth,
        "answers": [parse_answer(text) for text in texts],
        "categories": [NAMES[c.code] for c in group.completions],
        "codes": [c.code for c in group.completions],
        "texts": list(texts),
        "finish": [c.finish for c in group.completions],
    }


def evaluate(
    collector: Collector,
    store: PromptStore,
    datasets: Mapping[str, Sequence[Example]],
    sampling: Sampling,
    k: int,
    world: World,
    predictions: Predictions,
    progress: Any = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Answers for every image of every dataset that has none yet, or one without a verdict.

    Args:
        collector: engine and judge of this evaluation.
        datasets: examples by dataset name.
        k: answers per image.
        predictions: answers already there, and where new ones go.
        progress: called with the number of images done since the last call.

    Returns:
        (all rows, skipped examples with reasons), the same on every rank.

    Raises:
        RuntimeError: too few verdicts (judge.max_fault_share); the answers so far are kept.
    """
    wanted = [example for part in datasets.values() for example in part]
    there = {key for key, row in predictions.rows.items() if judged(row)}
    missing = [example for example in wanted if example.key not in there]
    mine = collector.share(missing, world)
    skipped: dict[str, str] = {}
    figures: Figures = {}
    chunks = CHUNK if collector.judge.concurrent else CHUNK_IN_TURN
    for start in range(0, len(mine), chunks):
        chunk = mine[start : start + chunks]
        work = [(e, p) for e in chunk if (p := store.get(e)) is not None]
        skipped.update({e.key: store.problems[e.key] for e in chunk if e.key in store.problems})
        if work:
            groups, timing = collector.collect(work, k, sampling)
            answered = {group.example.key for group in groups}
            skipped.update({e.key: NO_ANSWER for e, _ in work if e.key not in answered})
            figures = summed([figures, timing.verdicts])
            if problem := too_many_faults(figures, collector.config.max_fault_share):
                raise RuntimeError(f"the evaluation stopped: {problem}")
            decode = collector.builder.decode
            predictions.add([_row(g, [decode(c.ids) for c in g.completions]) for g in groups])
        if progress is not None:
            progress(len(chunk))
    rows: dict[str, dict[str, Any]] = {}
    for part in world.gather(predictions.rows):
        merge(rows, part.values())
    for bad in world.gather(skipped):
        skipped.update(bad)
    skipped = {key: reason for key, reason in skipped.items() if key not in rows}
    return [rows[e.key] for e in wanted if e.key in rows], skipped
