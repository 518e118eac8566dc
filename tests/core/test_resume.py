"""A run that was interrupted goes on as if it had not been, or says why it cannot."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import assert_same, json_of, lines, lot, run_config, step_lines, stored
from speciarl.core.checkpoint import CheckpointError
from speciarl.core.config import Config
from speciarl.core.learner import Learner
from speciarl.core.report import changed_settings
from speciarl.core.train import train
from speciarl.core.world import World
from tracecheck import read_trace

WORDS = ("train.save_every=1", "train.keep=0", "train.steps=4")
NO_EVALUATION = ("data.eval.birds=none", "data.eval.flowers=none")
Configure = Callable[..., Config]


@pytest.fixture(autouse=True)
def judged_by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)


@pytest.fixture(scope="module")
def configure(toy_root: Path, toy_model_dir: Path) -> Configure:
    """Four steps with a checkpoint after each, without evaluation: configure(out, *words)."""
    return lambda out, *words: run_config(
        toy_root, toy_model_dir, out, *NO_EVALUATION, *WORDS, *words
    )


@pytest.fixture(scope="module")
def whole(world: World, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speciarl.core.collect.codes_of", lot)
        return train(configure(out), world, quiet=True)


@pytest.fixture(scope="module")
def two_steps(
    whole: Path, world: World, configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speciarl.core.collect.codes_of", lot)
        return train(configure(out, "train.steps=2"), world, quiet=True)


@pytest.fixture
def half(two_steps: Path, tmp_path: Path) -> Path:
    """A run of two steps, with a checkpoint after each."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def progress(out: Path, step: int) -> dict[str, object]:
    return json_of(out / "checkpoints" / f"step-{step}" / "state.json")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_same(stored(one, 4), stored(other, 4))
    assert progress(one, 4) == progress(other, 4)
    timed = ("time", "tokens_per_s")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in step_lines(out)]
        for out in (one, other)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    models = [(out / "model" / "model.safetensors").read_bytes() for out in (one, other)]
    assert models[0] == models[1]


def test_two_steps_then_two_more_are_four(
    whole: Path, half: Path, world: World, configure: Configure
) -> None:
    train(configure(half), world, quiet=True)
    assert_equal_runs(half, whole)
    earlier = json_of(half / "config.until-step-2.json")
    assert earlier["train"]["steps"] == 2
    assert json_of(half / "config.json")["train"]["steps"] == 4


def test_an_engine_that_sleeps_while_the_policy_learns_changes_nothing(
    half: Path, whole: Path, world: World, configure: Configure
) -> None:
    config = configure(half, "rollout.sleep=true")
    changed = ["train.steps: 2 -> 4", "rollout.sleep: None -> True"]
    assert changed_settings(half, config)[1:] == changed  # the first is the copied folder
    train(config, world, quiet=True)
    assert_equal_runs(half, whole)
    assert changed_settings(half, config) == []


def test_a_resumed_timeline_goes_on_and_tracing_changes_nothing(
    whole: Path, world: World, configure: Configure, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(configure(out, "train.steps=2", "train.trace_steps=-1"), world, quiet=True)
    train(configure(out, "train.trace_steps=1"), world, quiet=True)
    assert_equal_runs(out, whole)
    spans = read_trace(out / "trace.json")
    saved = [span["args"]["step"] for span in spans if span["name"] == "save"]
    assert saved == [1, 2, 3]
    pushed = [span["args"]["step"] for span in spans if span["name"] == "push"]
    assert pushed == [0, 1, 2, 2, 3]  # each start pushes first
    starts = [span["ts"] for span in spans if span["name"] == "learn"]
    assert starts == sorted(starts) and len(starts) == 3


def test_a_run_that_died_in_a_step_repeats_it(
    whole: Path, world: World, configure: Configure, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    learn, calls = Learner.learn, []

    def dies(self: Learner, *given: object) -> object:
        calls.append(given)
        if len(calls) == 4:
            raise RuntimeError("power failure")
        return learn(self, *given)  # type: ignore[arg-type]

    config = configure(tmp_path / "run", "train.save_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", dies)
        with pytest.raises(RuntimeError, match="power failure"):
            train(config, world, quiet=True)
    assert len(step_lines(tmp_path / "run")) == 2  # step 3's were still under way
    train(config, world, quiet=True)
    assert_equal_runs(tmp_path / "run", whole)


def test_a_full_disk_costs_only_the_steps_since_the_last_checkpoint(
    whole: Path, half: Path, world: World, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.json")

    with monkeypatch.context() as patch:
        patch.setattr("speciarl.core.checkpoint.write_manifest", full)
        with pytest.raises(CheckpointError, match=r"step-3 was not saved: .*No space left"):
            train(configure(half), world, quiet=True)
    assert {path.name for path in (half / "checkpoints").iterdir()} == {"step-1", "step-2"}
    train(configure(half), world, quiet=True)
    assert_equal_runs(half, whole)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(
    half: Path, world: World, configure: Configure, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for path in (out / "checkpoints").iterdir():
        path.rename(path.with_name(f"{path.name}.tmp"))
    train(configure(out, "train.steps=1"), world, quiet=True)
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-1"]


def test_never_refuses_a_folder_with_a_run_and_leaves_it_alone(
    half: Path, world: World, configure: Configure
) -> None:
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    with pytest.raises(
        FileExistsError, match=r"holds a run \(step 2\).*train.resume=never.*train.out"
    ):
        train(configure(half, "train.resume=never"), world, quiet=True)
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


def test_fewer_steps_than_were_made_are_refused(
    half: Path, world: World, configure: Configure
) -> None:
    with pytest.raises(ValueError, match=r"a run of 2 steps, train.steps=1"):
        train(configure(half, "train.steps=1"), world, quiet=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_previous_taken_only_if_asked(
    damage: str, whole: Path, half: Path, world: World, configure: Configure
) -> None:
    shard = next((half / "checkpoints" / "step-2").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data[:-10] if damage == "truncated" else data)
    with pytest.raises(CheckpointError, match=f"{shard.name}.*") as refused:
        train(configure(half), world, quiet=True)
    assert "train.resume=previous" in str(refused.value)
    if damage == "flipped":
        train(configure(half, "train.resume=previous"), world, quiet=True)
        assert_equal_runs(half, whole)


def test_previous_needs_one(half: Path, world: World, configure: Configure) -> None:
    (half / "checkpoints" / "step-1").rename(half / "checkpoints" / "other")
    with pytest.raises(FileNotFoundError, match="no checkpoint before the newest"):
        train(configure(half, "train.resume=previous"), world, quiet=True)


def test_a_checkpoint_of_another_kind_of_model_is_refused(
    half: Path, world: World, configure: Configure
) -> None:
    with pytest.raises(
        CheckpointError, match=r"tensor policy\.\S+lora_\S+ is not in the checkpoint"
    ):
        train(configure(half, "model.lora_rank=2"), world, quiet=True)
