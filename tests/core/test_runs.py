"""Whole runs of a random toy model: what they leave behind, and what stops them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from runs import json_of, lines, lot, open_trainer, run_config, step_lines, stored
from speciarl.core.examples import load_examples
from speciarl.core.prompts import PromptBuilder
from speciarl.core.settings import to_dict
from speciarl.core.train import train
from speciarl.core.trainer import TrainingStopped
from speciarl.core.world import World
from speciarl.kernels.reward import RULES, RewardSpec
from speciarl.rollout.engine import EngineDead

RATES = ("wrong", "abstain", "generic", "less_specific", "specific", "more_specific", "format")


@pytest.fixture(autouse=True)
def judged_by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)


@pytest.fixture(scope="module")
def finished(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of three steps, with every file that it leaves."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    words = ("train.save_every=1", "train.keep=2", "train.samples_every=1", "evaluation.every=2")
    config = run_config(toy_root, toy_model_dir, out, *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speciarl.core.collect.codes_of", lot)
        assert train(config, world, quiet=True) == out
    assert json_of(out / "config.json") == to_dict(config)
    return out


def test_metrics_hold_each_value_of_each_step_once(finished: Path) -> None:
    values = [
        (line["step"], name)
        for line in lines(finished / "metrics.jsonl")
        for name in line
        if name not in ("step", "timestamp")
    ]
    assert len(values) == len(set(values))
    assert [line["step"] for line in step_lines(finished)] == [1, 2, 3]
    assert [step for step, name in values if name == "eval/mean_hm"] == [0, 2, 3]


def test_tensorboard_has_the_same_steps(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(finished / "tensorboard"))
    reader.Reload()
    logged = {line["step"]: line["policy/loss"] for line in step_lines(finished)}
    events = {event.step: event.value for event in reader.Scalars("policy/loss")}
    assert events == pytest.approx(logged)


def test_every_step_agrees_with_the_engine_and_counts_every_answer(finished: Path) -> None:
    for line in step_lines(finished):
        assert line["mismatch/max"] < 1e-4
        assert sum(line[f"rate/{name}"] for name in RATES) == pytest.approx(1)
        assert line["rate/unscored"] == 0 and line["skipped/updates"] == 0
        assert line["groups/count"] == 2 and 0 <= line["reward/mean"] <= 1
        assert all(math.isfinite(line[f"policy/{name}"]) for name in ("loss", "kl", "grad_norm"))


def test_samples_versions_and_the_newest_checkpoints_are_kept(finished: Path) -> None:
    samples = lines(finished / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3]
    assert all(len(sample["completions"]) == 3 for sample in samples)
    assert json_of(finished / "versions.json")["torch"] == torch.__version__
    folders = {path.name for path in (finished / "checkpoints").iterdir()}
    assert folders == {"step-2", "step-3"}
    before, after = stored(finished, 2), stored(finished, 3)
    weights = [name for name in before if name.startswith("policy.")]
    moved = [name for name in weights if not before[name].equal(after[name])]
    assert len(moved) > len(weights) / 2  # but not biases of keys, which softmax ignores


def test_evaluations_have_metrics_and_predictions(finished: Path) -> None:
    for step in (0, 2, 3):
        folder = finished / "evaluation" / f"step-{step:06d}"
        record = json_of(folder / "metrics.json")
        assert {name: part["n"] for name, part in record["datasets"].items()} == {
            "birds": 4,
            "flowers": 4,
        }
        assert len(lines(folder / "predictions.rank0.jsonl")) == 8


def test_final_model_loads_and_answers_as_the_engine_did(finished: Path, toy_root: Path) -> None:
    folder = finished / "model"
    config = run_config(toy_root, folder, finished)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    builder = PromptBuilder(folder, instruction=config.data.instruction)
    images = load_examples("birds", config.data.eval["birds"])
    rows = lines(finished / "evaluation" / "step-000003" / "predictions.rank0.jsonl")
    said = {row["key"]: row["texts"] for row in rows}
    for example in images:
        prompt = builder.build(example)
        ids = prompt.input_ids[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == builder.image_id).int(),
            **prompt.images,
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=builder.banned_ids,
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert [text] == said[example.key]


def test_a_run_or_a_checkpoint_named_as_model_points_to_the_model(
    finished: Path, world: World, toy_root: Path
) -> None:
    for folder in (finished, finished / "checkpoints" / "step-3"):
        with pytest.raises(FileNotFoundError, match=f"the run's model is in {finished / 'model'}"):
            train(run_config(toy_root, folder, finished.with_name("other")), world, quiet=True)


def test_a_finished_run_ends_at_once_with_its_table(
    finished: Path, world: World, toy_root: Path, toy_model_dir: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = (finished / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("speciarl.core.parts.evaluate", lambda *given: pytest.fail("evaluated"))
    train(run_config(toy_root, toy_model_dir, finished), world)
    shown = capsys.readouterr().out
    assert "resumed from step 3 of 3" in shown
    assert "base and after 3 steps" in shown and "flowers" in shown
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_training_without_evaluation_tables(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    words = ("data.eval.birds=none", "data.eval.flowers=none", "train.steps=1")
    out = train(run_config(toy_root, toy_model_dir, tmp_path / "run", *words), world)
    assert (out / "model" / "model.safetensors").exists()
    assert not (out / "evaluation").exists()


def test_every_reward_rule_learns(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    trainer = open_trainer(run_config(toy_root, toy_model_dir, tmp_path / "run"), world)
    trainer.push()
    for rule in RULES:
        values = (0.0, 0.1, 0.2, 0.3, 0.9, 1.0) if rule == "table" else None
        trainer.parts.learner.reward = RewardSpec(rule, table=values)
        trainer.step()
    trainer.settle()
    trainer.parts.close()
    logged = step_lines(tmp_path / "run")
    assert len(logged) == len(RULES)
    assert all(0 < line["policy/grad_norm"] < math.inf for line in logged)


@pytest.mark.parametrize(
    "words",
    [
        ("objective.algorithm=dr-grpo",),
        ("objective.algorithm=dapo", "objective.importance_cap=2.0"),
        ("objective.aggregation=sequence-mean", "objective.entropy_coef=0.01"),
        ("model.lora_rank=4",),
        ("model.freeze_vision=true", "train.token_budget=40"),
    ],
)
def test_other_objectives_and_models_learn(
    words: tuple[str, ...], world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    config = run_config(toy_root, toy_model_dir, tmp_path / "run", *words)
    trainer = open_trainer(config, world)
    before = {n: p.detach().clone() for n, p in trainer.parts.policy.parameters().items()}
    trainer.push()
    trainer.step()
    trainer.step()
    trainer.settle()
    trainer.parts.close()
    moved = [n for n, p in trainer.parts.policy.parameters().items() if not p.equal(before[n])]
    assert moved and not any("visual" in name for name in moved if "lora" in words[0])
    assert all(line["mismatch/max"] < 1e-4 for line in step_lines(tmp_path / "run"))


def test_second_mini_batch_is_clipped(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    words = ("train.prompts=4", "optim.lr=0.02", "objective.kl_coef=0.0")
    for size, clipped in ((4, False), (2, True)):
        out = tmp_path / str(size)
        config = run_config(toy_root, toy_model_dir, out, *words, f"train.mini_batch={size}")
        trainer = open_trainer(config, world)
        trainer.push()
        trainer.step()
        trainer.settle()
        trainer.parts.close()
        assert trainer.progress.updates == 4 // size
        assert (step_lines(out)[0]["policy/clip_fraction"] > 0) == clipped


def test_weights_that_are_not_finite_are_noticed_by_the_engine(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    trainer = open_trainer(run_config(toy_root, toy_model_dir, tmp_path / "run"), world)
    next(iter(trainer.parts.policy.parameters().values())).data.fill_(math.inf)
    with pytest.raises(EngineDead, match="not finite"):
        trainer.run()
    trainer.parts.close()


def test_gradients_that_are_not_finite_are_skipped_then_stop_the_run(
    world: World,
    toy_root: Path,
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(toy_root, toy_model_dir, tmp_path / "run", "optim.max_nonfinite=2")
    trainer = open_trainer(config, world)
    backward = torch.Tensor.backward

    def poisoned(loss: torch.Tensor) -> None:
        backward(loss)
        gradient: Any = next(iter(trainer.parts.policy.parameters().values())).grad
        gradient.to_local().view(-1)[0] = math.inf

    def step(bad: bool) -> None:
        monkeypatch.setattr(torch.Tensor, "backward", poisoned if bad else backward)
        trainer.step()

    trainer.push()
    step(bad=False)
    good = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    step(bad=True)
    assert all(torch.equal(value, good[name]) for name, value in trainer.tensors().items())
    step(bad=False)  # after which the count starts again
    trainer.settle()
    assert (trainer.progress.skipped_updates, trainer.progress.bad_in_a_row) == (1, 0)
    logged = step_lines(tmp_path / "run")
    assert [line["skipped/updates"] for line in logged] == [0, 1, 1]
    assert [line["policy/grad_norm"] == "inf" for line in logged] == [False, True, False]

    with pytest.raises(TrainingStopped, match="2 updates in a row had a non-finite gradient"):
        for _ in range(3):
            step(bad=True)
    trainer.parts.close()
    assert trainer.progress.skipped_updates == 3
    rows = json_of(tmp_path / "run" / "stopped-at-step-5.json")
    assert {row["step"] for row in rows} == {4, 5}
