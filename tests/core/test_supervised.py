"""The supervised stage: its loss is the plain cross-entropy, and it teaches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from runs import assert_same, json_of, lines, run_config, step_lines, stored
from speciarl.core.config import Config
from speciarl.core.parts import build
from speciarl.core.supervised import Supervised
from speciarl.core.train import train
from speciarl.core.trainer import TrainingStopped
from speciarl.core.world import World

Configure = Callable[..., Config]
LABELS = 2  # of the 40 labels, so that a few steps are enough to learn them


@pytest.fixture(scope="module")
def two_labels(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with two labels, links to those of the toy world."""
    root = tmp_path_factory.mktemp("labels") / "images"
    for folder in sorted((toy_root / "birds" / "images").iterdir())[:LABELS]:
        (root / folder.name).mkdir(parents=True)
        for image in folder.iterdir():
            (root / folder.name / image.name).symlink_to(image)
    return root


@pytest.fixture(scope="module")
def configure(toy_root: Path, toy_model_dir: Path, two_labels: Path) -> Configure:
    """Six images of two labels, no evaluation: configure(out, *words)."""
    table = {"format": "folder", "path": two_labels, "split": "all"}
    words = [f"data.train.birds.{key}={value}" for key, value in table.items()]
    words += ["data.eval.birds=none", "data.eval.flowers=none", "rollout.max_new_tokens=8"]
    words += ["train.prompts=4", "train.mini_batch=4"]
    return lambda out, *more: run_config(toy_root, toy_model_dir, out, *words, *more)


def trainer_of(config: Config, world: World) -> Supervised:
    return Supervised(config, world, build(config, world, supervised=True, quiet=True))


def test_loss_and_gradient_are_those_of_plain_cross_entropy(
    configure: Configure, world: World, toy_model_dir: Path, tmp_path: Path
) -> None:
    """transformers' own forward and loss, over all answer tokens of the batch."""
    config = configure(tmp_path, "data.answer=I see <answer>{}</answer>", "train.token_budget=50")
    trainer = trainer_of(config, world)
    examples = trainer.parts.stream.draw(4)
    gradients: dict[str, torch.Tensor] = {}
    step = trainer.parts.optimizer.step

    def keep(lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        for name, parameter in trainer.parts.policy.parameters().items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.full_tensor().clone()  # type: ignore[attr-defined]
        return step(lr)

    trainer.parts.optimizer.step = keep  # type: ignore[method-assign]
    learned = trainer.learn(examples)
    trainer.parts.close()

    model = AutoModelForImageTextToText.from_pretrained(toy_model_dir, dtype=torch.float32)
    builder, banned = trainer.parts.builder, trainer.parts.builder.banned_ids
    total, count = torch.zeros(()), 0
    for example in examples:
        prompt = builder.build(example)
        answer = builder.tokenizer(f"I see <answer>{example.truth}</answer>")["input_ids"]
        answer = [*answer, builder.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        ids = torch.cat([prompt.input_ids, torch.tensor(answer)])[None]
        kinds = (ids == builder.image_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **prompt.images).logits[0]
        logits[:, banned] = -torch.inf
        at = slice(len(prompt.input_ids) - 1, -1)
        total = total + torch.nn.functional.cross_entropy(
            logits[at], torch.tensor(answer), reduction="sum"
        )
        count += len(answer)
    (total / count).backward()
    assert learned.stats.tolist()[-2] == pytest.approx(float(total.detach() / count), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


def test_it_teaches_and_exports(
    configure: Configure, world: World, toy_root: Path, two_labels: Path, tmp_path: Path
) -> None:
    tables = {
        "format": "folder",
        "path": two_labels,
        "split": "all",
        "taxonomy": toy_root / "taxonomy.json",
    }
    words = [f"data.eval.birds.{key}={value}" for key, value in tables.items()]
    words += ["data.eval.birds.k=0", f"data.train.birds.taxonomy={toy_root / 'taxonomy.json'}"]
    taught = ("train.steps=24", "optim.lr=3e-3", "train.save_every=0")
    out = train(configure(tmp_path / "run", *words, *taught), world, supervised=True, quiet=True)
    logged = step_lines(out)
    losses = [line["policy/loss"] for line in logged]
    assert losses[0] > 5 and max(losses[-4:]) < 0.3
    assert {"optim/lr", "policy/grad_norm", "tokens_per_s/learn"} <= logged[0].keys()
    before, after = (
        json_of(out / "evaluation" / f"step-{step:06d}" / "metrics.json")["datasets"]["birds"]
        for step in (0, 24)
    )
    assert before["correctness"] == 0 and after["specificity"] == 1
    assert after["correctness"] >= 0.5
    rows = lines(out / "evaluation" / "step-000024" / "predictions.rank0.jsonl")
    assert {row["finish"][0] for row in rows} == {"stop"}
    model = AutoModelForImageTextToText.from_pretrained(out / "model", dtype=torch.float32)
    weights = stored(out, 24)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, weights[f"policy.{name}"])

    # What was taught can be reinforced, and the true judge finds right answers in it.
    config = configure(tmp_path / "reinforced", f"model.path={out / 'model'}", *words)
    reinforced = step_lines(train(config, world, quiet=True))
    assert all(line["rate/specific"] > 0.3 and line["rate/format"] < 0.3 for line in reinforced)
    assert all(line["mismatch/max"] < 1e-4 for line in reinforced)


def test_it_resumes_to_the_same_weights(configure: Configure, world: World, tmp_path: Path) -> None:
    whole = train(configure(tmp_path / "whole"), world, supervised=True, quiet=True)
    train(configure(tmp_path / "half", "train.steps=1"), world, supervised=True, quiet=True)
    half = train(configure(tmp_path / "half"), world, supervised=True, quiet=True)
    assert_same(stored(half, 3), stored(whole, 3))


def test_one_update_a_step_whatever_the_mini_batch(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    words = ("train.mini_batch=2", "optim.schedule=cosine")
    out = train(configure(tmp_path / "run", *words), world, supervised=True, quiet=True)
    assert json_of(out / "checkpoints" / "step-3" / "state.json")["updates"] == 3
    assert step_lines(out)[-1]["optim/lr"] == pytest.approx(1e-4)  # a tenth of the peak


def test_labels_need_no_taxonomy_entry_to_be_taught(
    configure: Configure, world: World, toy_root: Path, two_labels: Path, tmp_path: Path
) -> None:
    image = next(two_labels.rglob("*.jpg"))
    for label in ("a {strange} label", "another"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        (tmp_path / "mine" / label / "1.jpg").symlink_to(image)
    words = [f"data.train.birds.path={tmp_path / 'mine'}", "train.prompts=2", "train.mini_batch=2"]
    words += [f"data.train.birds.taxonomy={toy_root / 'taxonomy.json'}", "train.steps=1"]
    train(configure(tmp_path / "run", *words), world, supervised=True, quiet=True)
    assert len(step_lines(tmp_path / "run")) == 1


def test_gradients_that_are_not_finite_stop_it_and_name_the_examples(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    trainer = trainer_of(configure(tmp_path, "optim.max_nonfinite=1"), world)
    next(iter(trainer.parts.policy.parameters().values())).data.fill_(torch.nan)
    with pytest.raises(TrainingStopped, match="1 updates in a row had a non-finite gradient"):
        trainer.step()
        trainer.step()
    trainer.parts.close()
    rows = json_of(tmp_path / "stopped-at-step-1.json")
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4
    assert {row["key"] for row in rows} <= {e.key for e in trainer.parts.data.train}
