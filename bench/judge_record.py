"""What the policy of a real toy run answers, step by step: the work that `judge.py` measures.

    python bench/judge_record.py --out bench/judge_pairs.json      (a minute)

20 steps of the toy world with the published batch, 256 prompts x 10 completions and two updates a
step, graded by the taxonomy. The file keeps, for every group that reached the judge, its truth and
how often each answer was given.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from speciarl.core.config import load_config
from speciarl.core.parts import build
from speciarl.core.trainer import Trainer
from speciarl.core.world import init_world, leave_world
from speciarl.judge.base import Judge, Pair, Verdict

Groups = list[list[Pair]]


class RecordingJudge:
    """Grades as `inner` does and keeps the pairs of every call; a call is a group."""

    def __init__(self, inner: Judge) -> None:
        self.inner = inner
        self.calls: Groups = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The inner judge's verdicts."""
        with self._lock:
            self.calls.append(list(pairs))
        return self.inner.grade(pairs)

    def take(self) -> Groups:
        """The groups since the last call, in an order that does not depend on threads."""
        with self._lock:
            calls, self.calls = self.calls, []
        return sorted(calls, key=lambda group: [(p.truth, p.prediction) for p in group])


def pack(steps: Iterable[Groups]) -> dict[str, Any]:
    """{"truths": [...], "answers": [...], "steps": [[[truth, answer, count, ...] per group]]}."""
    truths: dict[str, int] = {}
    answers: dict[str, int] = {}
    packed = []
    for groups in steps:
        rows = []
        for group in groups:
            row = [truths.setdefault(group[0].truth, len(truths))]
            for answer, count in Counter(pair.prediction for pair in group).items():
                row += [answers.setdefault(answer, len(answers)), count]
            rows.append(row)
        packed.append(rows)
    return {"truths": list(truths), "answers": list(answers), "steps": packed}


def load_steps(path: Path) -> list[Groups]:
    """The groups of every step, as they were recorded.

    Raises ValueError naming the file when it is not such a record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        truths, answers = record["truths"], record["answers"]
        return [
            [
                [
                    Pair(truths[row[0]], answers[answer])
                    for answer, count in zip(row[1::2], row[2::2], strict=True)
                    for _ in range(count)
                ]
                for row in rows
            ]
            for rows in record["steps"]
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a record of judge_record.py: {error!r}") from None


def record(sets: Sequence[str], steps: int) -> dict[str, Any]:
    """A run of `steps` steps, packed; no evaluation and no checkpoint.

    Raises RuntimeError when a call to the judge mixed groups.
    """
    sets = (*sets, f"train.steps={steps}", "evaluation.every=0")
    config = load_config("toyworld", None, sets)
    world = init_world(threads=config.train.threads)
    parts = build(config, world, quiet=True)
    judge = RecordingJudge(parts.collector.judge)
    parts.collector.judge = judge
    done: list[Groups] = []
    try:
        trainer = Trainer(config, world, parts)
        trainer.push()
        while trainer.progress.step < steps:
            trainer.step()
            done.append(judge.take())
            click.echo(f"step {trainer.progress.step}: {sum(map(len, done[-1]))} pairs", err=True)
    finally:
        parts.close()
        leave_world()
    if any(len({pair.truth for pair in group}) != 1 for groups in done for group in groups):
        raise RuntimeError("a call to the judge held pairs of several truths: no group")
    return pack(done)


@click.command()
@click.option("--steps", default=20, show_default=True)
@click.option("--prompts", default=256, show_default=True, help="Images of a step.")
@click.option("--run", "folder", default="runs/judge-record", show_default=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(steps: int, prompts: int, folder: str, out: Path) -> None:
    """Train on the toy world and write what its judge was asked."""
    sets = [
        f"train.out={folder}",
        f"train.prompts={prompts}",
        f"train.mini_batch={max(1, prompts // 2)}",
        "train.resume=never",
        "train.samples_every=0",
    ]
    packed = record(sets, steps)
    command = f"python bench/judge_record.py --steps {steps} --prompts {prompts}"
    lines = ",\n".join(json.dumps(rows, separators=(",", ":")) for rows in packed.pop("steps"))
    head = json.dumps({"command": command, **packed}, ensure_ascii=False)[:-1]
    out.write_text(f'{head}, "steps": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
