"""Whole runs with adaptive N: resumed, on two processes, with a judge in turn."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankruns
from judges import FakeJudge
from runs import assert_same, lines, lot, run_config, step_lines, stored
from speciarl.core.train import train
from speciarl.core.world import World
from speciarl.judge.registry import FACTORIES
from speciarl.kernels.codes import S_MINUS, A, S, W
from tracecheck import read_trace

WORDS = (
    "train.prompts=4", "train.mini_batch=2", "train.save_every=1", "train.steps=3",
    "train.samples_every=1", "data.eval.birds=none", "data.eval.flowers=none",
    "rollout.n=5", "rollout.n_start=2", "rollout.n_max=7", "optim.eps=1e-4",
)  # fmt: skip
COUNTS = ("completions/count", "groups/", "adaptive/", "rate/", "reward/")


def counts(out: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name.startswith(COUNTS)}
        for line in step_lines(out)
    ]


@pytest.fixture(scope="module")
def whole(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three steps of one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speciarl.core.collect.codes_of", lot)
        return train(run_config(toy_root, toy_model_dir, out, *WORDS), world, quiet=True)


def test_a_run_counts_its_rounds(whole: Path) -> None:
    for line in counts(whole):
        assert line["groups/count"] == 4 and line["groups/empty"] == 0
        assert 8 <= line["completions/count"] <= 20
        assert line["adaptive/budget_used"] == line["completions/count"] / 20
        assert line["adaptive/rounds"] >= 1 and 0 <= line["adaptive/uncertain"] <= 1
    sizes = [len(sample["completions"]) for sample in lines(whole / "samples.jsonl")]
    assert len(set(sizes)) > 1 and min(sizes) >= 2 and max(sizes) <= 7
    assert sum(sizes) == sum(line["completions/count"] for line in counts(whole))


def test_it_goes_on_as_if_nothing_had_been(
    whole: Path, world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)
    for steps in (2, 3):
        words = (*WORDS, f"train.steps={steps}")
        config = run_config(toy_root, toy_model_dir, tmp_path / "run", *words)
        out = train(config, world, quiet=True)
    assert_same(stored(out, 3), stored(whole, 3))
    assert counts(out) == counts(whole)


def assert_whole_trace(out: Path) -> None:
    """Both ranks' first two steps, rank 0's idle time as it was logged, one push a step."""
    spans = read_trace(out / "trace.json")
    for rank in (0, 1):
        mine = [span for span in spans if span["pid"] == rank]
        assert {span["process"] for span in mine} == {f"rank {rank}"}
        assert {span["args"]["step"] for span in mine} == {0, 1, 2}
        tracks = {span["cat"] for span in mine}
        assert tracks == {"prompts", "generate", "judge", "learn", "push", "save", "idle"}
        pushed = [span["args"]["step"] for span in mine if span["name"] == "push"]
        assert pushed == [0, 1, 2]
    for line in step_lines(out)[:2]:
        idle = [
            span["dur"] / 1e6
            for span in spans
            if (span["pid"], span["cat"], span["args"]["step"]) == (0, "idle", line["step"])
        ]
        assert sum(idle) == pytest.approx(line["time/idle"], abs=1e-4)
        assert line["time/idle"] < line["time/step"]


@pytest.mark.timeout(300)
def test_two_processes_make_the_same_plan_and_learn_the_same(
    whole: Path, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    words = (*WORDS, "train.trace_steps=2")
    two = rankruns.run(toy_root, toy_model_dir, tmp_path / "two", 2, *words)
    assert_whole_trace(two)
    assert [line.keys() for line in counts(two)] == [line.keys() for line in counts(whole)]
    for ours, theirs in zip(counts(two), counts(whole), strict=True):
        assert ours == pytest.approx(theirs)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, two))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-4, msg=name)


def test_a_judge_in_turn_changes_nothing(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def factory(config: object, taxonomies: object) -> FakeJudge:
        concurrent = not str(config.model).endswith("in-turn")  # type: ignore[attr-defined]
        return FakeJudge(
            lambda pair: (W, S_MINUS, A, S)[len(pair.prediction) % 4], concurrent=concurrent
        )

    monkeypatch.setitem(FACTORIES, "openai", factory)
    monkeypatch.setattr("speciarl.judge.grading.parse_answer", lambda text: text)
    monkeypatch.setattr("speciarl.judge.rules.rule", lambda truth, prediction, names: None)
    judge = ("judge.kind=openai", "judge.base_url=http://localhost:1/v1", "judge.cache=")
    runs = []
    for name, word in (("plain", "false"), ("in-turn", "true")):
        words = (*judge, f"judge.model={name}", f"rollout.sleep={word}", "train.steps=2")
        config = run_config(toy_root, toy_model_dir, tmp_path / name, *WORDS, *words)
        runs.append(train(config, world, quiet=True))
    assert counts(runs[0]) == counts(runs[1])
    assert counts(runs[0])[0]["adaptive/rounds"] > 1
    assert_same(stored(runs[0], 2), stored(runs[1], 2))
