"""The commands as a user calls them: from images to a table, and errors that fit on a line."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from runs import json_of, lines, lot, settings, step_lines
from speciarl.core import command, evaluate, sft, train
from speciarl.core.config import Config
from speciarl.core.settings import load, to_toml
from speciarl.core.settings_schema import dotted, slots
from speciarl.core.world import World, leave_world

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "sft": sft.main}
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command changes in its process is put back."""
    monkeypatch.delenv("SPECIARL_TRACEBACK", raising=False)
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    leave_world()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(toy_root: Path, toy_model_dir: Path, tmp_path: Path) -> Run:
    """run("train", "train.steps=1", "--quiet"): settings of a short run in a file, then these."""
    given = settings(toy_root, toy_model_dir, tmp_path / "run")
    (tmp_path / "mine.toml").write_text(to_toml(load(Config, [given])))

    def call(name: str, *words: str) -> Result:
        options = ["--preset", "", "--config", str(tmp_path / "mine.toml")]
        for word in words:
            options += [word] if word.startswith("-") or "=" not in word else ["--set", word]
        return CliRunner().invoke(COMMANDS[name], options)

    return call


def test_train_evaluate_and_fine_tune(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", "train.steps=2", "data.eval.flowers=none")
    assert result.exit_code == 0, result.output
    assert "step 2/2" in result.output and "base and after 2 steps" in result.output
    assert f"model: {out / 'model'}" in result.output
    assert "Loading weights" not in result.output  # transformers' bars would break the display

    words = ("--model", str(out / "model"), "--out", str(tmp_path / "evaluation"))
    result = run("evaluate", *words, "data.train.birds=none")
    assert result.exit_code == 0, result.output
    assert re.search(r"birds\W+4\W.*\n.*flowers\W+4\W.*\n.*mean of HMs", result.output)
    last = lines(out / "evaluation" / "step-000002" / "predictions.rank0.jsonl")
    again = lines(tmp_path / "evaluation" / "predictions.rank0.jsonl")
    assert [row["texts"] for row in again[:4]] == [row["texts"] for row in last]

    result = run("sft", "--quiet", "train.steps=1", f"train.out={tmp_path / 'sft'}")
    assert (result.exit_code, result.output) == (0, "")
    assert len(step_lines(tmp_path / "sft")) == 1
    result = run("train", "train.steps=1")
    assert result.exit_code == 1
    assert "holds a run of 2 steps, train.steps=1" in result.output


def test_mistakes_in_settings_end_with_their_names(run: Run, tmp_path: Path) -> None:
    result = run("train", "train.stps=3", "rollout.n=0")
    assert result.exit_code == 1
    assert result.output.startswith("Error: unknown key train.stps = 3 (--set): the nearest valid")
    assert "rollout: n=0: must be" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_an_expected_failure_is_one_message(run: Run, tmp_path: Path) -> None:
    words = ("train", f"data.train.birds.path={tmp_path / 'nowhere'}")
    result = run(*words)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.output.startswith(f"error: no folder {tmp_path / 'nowhere'}; expected the layout")
    assert "SPECIARL_TRACEBACK=1 shows where" in result.output
    assert "Traceback" not in result.output
    os.environ["SPECIARL_TRACEBACK"] = "1"
    assert isinstance(run(*words).exception, FileNotFoundError)


def test_a_bug_is_not_dressed_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train", lambda *given, **named: {}["missing"])
    assert isinstance(run("train").exception, KeyError)


def test_a_rank_that_fails_names_itself_and_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(3, 4, 3, 4, torch.device("cpu"), mesh=None)  # type: ignore[arg-type]
    left: list[int] = []
    monkeypatch.setattr(command, "init_world", lambda threads, device: world)
    monkeypatch.setattr(os, "_exit", left.append)

    def work(world: World) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(SystemExit):
        command.run_guarded(Config(), work)
    assert left == [1]
    assert capsys.readouterr().err.startswith("error (rank 3): out of memory")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_that_parse(name: str) -> None:
    shown = CliRunner().invoke(COMMANDS[name], ["--help"]).output
    examples = re.findall(rf"torchrun.* core/{name}\.py ?(.*)", shown)
    assert len(examples) >= 2
    for example in examples:
        words = example.partition(" > ")[0].replace('""', "''").split()
        words = ["" if word == "''" else word for word in words]
        if "mine.toml" not in words:
            result = CliRunner().invoke(COMMANDS[name], [*words, "--print-config"])
            assert result.exit_code == 0, (example, result.output)


def test_help_config_explains_every_setting() -> None:
    shown = CliRunner().invoke(train.main, ["--help-config"]).output
    assert all(f"\n{dotted(slot.key)} " in f"\n{shown}" for slot in slots(Config))


def test_printed_settings_read_back_with_later_ones_over_earlier(tmp_path: Path, run: Run) -> None:
    def printed(*words: str) -> str:
        return run("train", *words, "--print-config").output

    first = printed("optim.lr=0.5", "objective.algorithm=dapo", "train.keep=7")
    (tmp_path / "printed.toml").write_text(first)
    again = printed("--config", str(tmp_path / "printed.toml"))
    assert again == first
    over = printed("--config", str(tmp_path / "printed.toml"), "optim.lr=0.25", "optim.lr=0.125")
    changed = [line for line in over.splitlines() if line not in first.splitlines()]
    assert changed == ["lr = 0.125"]
    (tmp_path / "small.toml").write_text("[train]\nkeep = 7\n")
    words = ["--config", str(tmp_path / "small.toml"), "--print-config"]
    alone = CliRunner().invoke(train.main, words).output
    assert "keep = 7\n" in alone and 'toyworld = ""\n' in alone
    over_preset = CliRunner().invoke(train.main, [*words, "--preset", "toyworld"]).output
    assert "keep = 7\n" in over_preset and 'toyworld = "data/toyworld"\n' in over_preset


def test_the_record_of_a_run_starts_the_same_run(run: Run, tmp_path: Path) -> None:
    run("train", "--quiet", "train.steps=1", "data.eval.flowers=none", "data.eval.birds=none")
    record: dict[str, Any] = json_of(tmp_path / "run" / "config.json")
    assert load(Config, [record]).train.steps == 1
