"""An engine that keeps completions back: evaluation and training go on with what is left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs import json_of, lines, lot, open_trainer, run_config, step_lines
from speciarl.core.evaluate import evaluate_model
from speciarl.core.evaluation import NO_ANSWER
from speciarl.core.world import World
from speciarl.rollout.engine import Group
from speciarl.rollout.native import NativeEngine


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of the first group nothing comes, of the second one completion; filled as it happens."""
    generate = NativeEngine.generate
    found: dict[str, int] = {}

    def losing(self: NativeEngine, *given: Any) -> Iterator[Group]:
        for group in generate(self, *given):
            if len(found) < 2:
                found[group.group_key] = len(found)
            kept = found.get(group.group_key, len(group.rollouts))
            yield Group(group.group_key, group.rollouts[:kept])

    monkeypatch.setattr(NativeEngine, "generate", losing)
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)
    return found


def test_an_image_without_any_answer_is_listed_and_asked_again_the_next_time(
    toy_root: Path, toy_model_dir: Path, world: World, tmp_path: Path, lost: dict[str, int]
) -> None:
    config = run_config(toy_root, toy_model_dir, tmp_path / "run", "evaluation.k=2")
    report = evaluate_model(config, world, tmp_path / "out")
    none, one = lost
    assert report.total.n == 7
    assert json_of(tmp_path / "out" / "metrics.json")["skipped"] == {none: NO_ANSWER}
    rows = {row["key"]: row for row in lines(tmp_path / "out" / "predictions.rank0.jsonl")}
    assert {key: len(row["codes"]) for key, row in rows.items() if key == one} == {one: 1}
    assert {len(row["codes"]) for key, row in rows.items() if key != one} == {2}
    lost[none] = 2
    assert evaluate_model(config, world, tmp_path / "out").total.n == 8
    assert json_of(tmp_path / "out" / "metrics.json")["skipped"] == {}


def test_a_step_learns_from_what_is_left(
    toy_root: Path, toy_model_dir: Path, world: World, tmp_path: Path, lost: dict[str, int]
) -> None:
    words = ("train.prompts=4", "train.mini_batch=2")
    trainer = open_trainer(run_config(toy_root, toy_model_dir, tmp_path / "run", *words), world)
    trainer.push()
    trainer.step()
    trainer.step()
    trainer.settle()
    trainer.parts.close()
    first, second = step_lines(tmp_path / "run")
    counted = ("groups/count", "groups/empty", "completions/count", "completions/lost")
    assert [first[name] for name in counted] == [3, 1, 7, 5]
    assert [second[name] for name in counted] == [4, 0, 12, 0]
    assert first["mismatch/max"] < 1e-4 and trainer.progress.updates == 4
