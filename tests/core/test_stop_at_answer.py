"""`rollout.stop_at_answer`: the same answers and verdicts, without what comes after an answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs import lines, open_trainer, run_config, step_lines
from speciarl.core.config import Config
from speciarl.core.evaluate import evaluate_model
from speciarl.core.evaluation import EvaluationConfig
from speciarl.core.world import World
from speciarl.rollout.stops import ANSWER_END

TOYBASE = Path(__file__).parents[2] / "core/toybase"  # it has learnt to answer in tags
STOP = "rollout.stop_at_answer=true"

Configure = Callable[..., Config]


@pytest.fixture
def configure(toy_root: Path, tmp_path: Path) -> Configure:
    words = ("rollout.max_new_tokens=12", "optim.lr=1e-4")
    return lambda *more: run_config(toy_root, TOYBASE, tmp_path / "run", *words, *more)


def predictions(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in lines(folder / "predictions.rank0.jsonl")}


@pytest.mark.parametrize("k", [1, 4])
def test_evaluations_find_the_same(
    configure: Configure, world: World, tmp_path: Path, k: int
) -> None:
    words = (f"evaluation.k={k}", "evaluation.temperature=1.0", "evaluation.top_p=1.0")
    plain = evaluate_model(configure(*words), world, tmp_path / "plain")
    stopped = evaluate_model(configure(*words, STOP), world, tmp_path / "stopped")
    assert stopped.as_dict() == plain.as_dict()
    before, after = predictions(tmp_path / "plain"), predictions(tmp_path / "stopped")
    assert {key: row["answers"] for key, row in after.items()} == {
        key: row["answers"] for key, row in before.items()
    }
    assert {key: row["codes"] for key, row in after.items()} == {
        key: row["codes"] for key, row in before.items()
    }
    assert all(len(row["answers"]) == k for row in after.values())
    ends = [text.endswith(ANSWER_END) for row in after.values() for text in row["texts"]]
    assert sum(ends) > 0.9 * len(ends)


def test_predictions_with_and_without_are_not_mixed(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    evaluate_model(configure(), world, tmp_path / "out")
    with pytest.raises(ValueError, match="other settings.*sampling"):
        evaluate_model(configure(STOP), world, tmp_path / "out")


def test_sampling_of_an_evaluation() -> None:
    for k in (1, 3):
        config = EvaluationConfig(k=k)
        assert config.sampling(7).stop_text == ""
        assert config.sampling(7, ANSWER_END).stop_text == ANSWER_END


def test_a_run_learns_from_completions_without_an_end_of_turn(
    configure: Configure, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.steps=2", "train.samples_every=1", "rollout.n=6", "train.prompts=4",
             "train.mini_batch=4", STOP)  # fmt: skip
    trainer = open_trainer(configure(*words), world)
    seen: list[Any] = []
    monkeypatch.setattr(
        trainer,
        "check_versions",
        lambda groups: seen.extend(c for g in groups for c in g.completions),
    )
    try:
        trainer.run()
        trainer.settle()
    finally:
        trainer.parts.close()
    tokenizer = trainer.parts.builder.tokenizer
    answer_end, *more = tokenizer(ANSWER_END, add_special_tokens=False)["input_ids"]
    assert not more
    answered = [c for c in seen if answer_end in c.ids]
    assert len(answered) > 0.9 * len(seen) == 0.9 * 48
    for completion in answered:
        assert completion.ids.index(answer_end) == len(completion.ids) - 1
        assert completion.finish == "stop"
        assert not set(completion.ids) & set(trainer.parts.builder.stop_ids)
    for line in step_lines(trainer.parts.out):
        assert line["mismatch/max"] < 1e-4
        assert line["skipped/updates"] == 0 and line["policy/grad_norm"] > 0
        assert line["rate/format"] < 0.1 and line["completions/cut"] < 0.1
