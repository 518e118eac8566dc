"""Training with rollouts by the real SGLang: whole runs under torchrun, and how they fail."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import speciarl.core
import speciarl.core.train
from runs import Sets, json_of, lines, open_trainer, run_config, settings, step_lines
from speciarl.core.trainer import TrainingStopped
from speciarl.core.world import World
from speciarl.rollout.sglang_child import SHARED

psutil = pytest.importorskip("psutil", reason="SGLang is not installed: make test-sglang")
BASE = Path(speciarl.core.__path__[0]) / "toybase"
STEPS = 5
RATES = ("rate/wrong", "rate/generic", "rate/less_specific", "rate/specific", "rate/format")
Start = Callable[..., Any]


def words(sets: Sets, front: str = "") -> Iterator[str]:
    """Settings as section.key=value."""
    for name, value in sets.items():
        if isinstance(value, dict):
            yield from words(value, f"{front}{name}.")
        else:
            yield f"{front}{name}={value}"


@pytest.fixture
def start(toy_root: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a run of the base policy in the background; what is left of it is killed."""
    running: list[Any] = []

    def start(out: str, *more: str, ranks: int = 1) -> Any:
        sets = [*words(settings(toy_root, BASE, tmp_path / out)), "train.prompts=16",
                "train.mini_batch=16", "rollout.n=10", "rollout.max_new_tokens=12",
                "optim.lr=1e-4", f"train.steps={STEPS}", "train.save_every=1", *more]  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", str(ranks), speciarl.core.train.__file__]  # fmt: skip
        command += [part for word in sets for part in ("--set", word)]
        with (tmp_path / f"{out}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        running.append(process)
        return process

    yield start
    for process in running:
        for child in family(process):
            child.kill()


def family(process: Any) -> list[Any]:
    """A process and all below it."""
    try:
        found = psutil.Process(process.pid)
        return [found, *found.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def finish(process: Any, log: Path) -> None:
    assert process.wait(timeout=280) == 0, log.read_text()[-4000:]


def wait_for_step(process: Any, out: Path, step: int) -> None:
    """Until so many steps were logged."""
    metrics, end = out / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or len(step_lines(out)) < step:
        assert process.poll() is None, out.with_suffix(".log").read_text()[-4000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def litter() -> set[str]:
    """What engines and their shared memory may leave on the machine."""
    shared = {str(file) for file in SHARED.iterdir()}
    folder = Path(tempfile.gettempdir())
    return shared | {str(file) for name in ("speciarl-*", "pymp-*") for file in folder.glob(name)}


def sglang(process: Any) -> list[Any]:
    """The engines' processes, schedulers first."""
    named = [(child, " ".join(child.cmdline())) for child in family(process)]
    schedulers = [child for child, name in named if name.startswith("sglang::scheduler")]
    return schedulers + [child for child, name in named if name.startswith("sglang::detok")]


def assert_close_to_trainer(out: Path) -> None:
    """Every step learnt, from log-probs that were the trainer's."""
    steps = step_lines(out)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    for line in steps:
        assert 0 < line["mismatch/max"] <= 1e-4, line
        assert line["mismatch/ess"] == pytest.approx(1.0)
        assert line["mismatch/alarms"] == 0


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out / "metrics.jsonl") if "eval/mean_hm" in line]


def test_two_ranks_and_engines_train_as_the_native_engine(start: Start, tmp_path: Path) -> None:
    before = litter()
    ours = start("ours", "rollout.engine=sglang", ranks=2)
    wait_for_step(ours, tmp_path / "ours", 1)
    assert len(sglang(ours)) == 4  # so the test for what is left could fail
    finish(ours, tmp_path / "ours.log")
    assert litter() == before
    finish(start("native", ranks=2), tmp_path / "native.log")
    assert_close_to_trainer(tmp_path / "ours")
    assert len(step_lines(tmp_path / "ours")) == STEPS

    # Greedy answers of the same weights are the same; those of the last differ by what was sampled.
    found, wanted = (evaluations(tmp_path / name) for name in ("ours", "native"))
    for name, value in wanted[0].items():
        if name.startswith("eval/"):
            assert found[0][name] == pytest.approx(value), name
    first, native = (step_lines(tmp_path / name)[0] for name in ("ours", "native"))
    for name in RATES:  # of 160 samples: four standard deviations of a difference
        assert first[name] == pytest.approx(native[name], abs=0.22), name
    assert first["completions/tokens"] == pytest.approx(native["completions/tokens"], abs=0.5)
    assert first["reward/mean"] == pytest.approx(native["reward/mean"], abs=0.22)


def test_two_ranks_share_one_engine(start: Start, tmp_path: Path) -> None:
    run = start("shared", "rollout.engine=sglang", "rollout.tp=2", "train.steps=2", ranks=2)
    wait_for_step(run, tmp_path / "shared", 1)
    assert len(sglang(run)) == 3  # a scheduler for each half of the weights
    finish(run, tmp_path / "shared.log")
    assert_close_to_trainer(tmp_path / "shared")


def test_a_killed_engine_and_a_killed_trainer(start: Start, tmp_path: Path) -> None:
    before, out, log = litter(), tmp_path / "killed", tmp_path / "killed.log"
    run = start("killed", "rollout.engine=sglang", "train.steps=200")
    wait_for_step(run, out, 2)
    sglang(run)[0].send_signal(signal.SIGKILL)
    assert run.wait(timeout=120) != 0
    assert "error: the SGLang engine for" in log.read_text()
    assert "ended with code -9" in log.read_text()
    assert litter() == before

    done = len(step_lines(out))
    run = start("killed", "rollout.engine=sglang", "train.steps=200")
    wait_for_step(run, out, done + 2)
    assert "resumed from step" in log.read_text()
    assert_close_to_trainer(out)
    everybody, trainer = family(run), psutil.Process(run.pid).children()[0]
    os.kill(run.pid, signal.SIGKILL)
    trainer.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(everybody, timeout=20)
    assert not alive
    folders = {name for name in litter() - before if Path(name).name.startswith("speciarl-")}
    assert litter() - before == folders  # a few names of sockets, until the next start
    from speciarl.rollout.sglang_scope import PrivateFolder

    PrivateFolder().remove()
    assert litter() == before


@pytest.mark.parametrize("checked", [True, False])
def test_a_lost_push(toy_root: Path, tmp_path: Path, world: World, checked: bool) -> None:
    """Refused before its step by the version; without that check, alarmed by the log-probs."""
    more = ("rollout.engine=sglang", "rollout.n=6", "rollout.max_new_tokens=12",
            "train.prompts=4", "train.mini_batch=4", "optim.lr=1e-4",
            f"mismatch.check_versions={checked}")  # fmt: skip
    trainer = open_trainer(run_config(toy_root, BASE, tmp_path / "run", *more), world)
    told: list[str] = []
    trainer.parts.monitor.message = told.append  # type: ignore[method-assign]
    try:
        trainer.push()
        trainer.step()
        trainer.step()
        trainer.settle()
        assert told == []
        load = trainer.parts.engine.load_weights
        trainer.parts.engine.load_weights = lambda tensors, *, version: None  # type: ignore
        trainer.step()
        trainer.parts.engine.load_weights = load  # type: ignore[method-assign]
        if checked:
            with pytest.raises(TrainingStopped, match=r"versions \[2\]; a weight push was lost"):
                trainer.step()
            return
        trainer.step()  # learns from what older weights said
        trainer.settle()
        assert any("engine and trainer differ by" in line and "jump" in line for line in told)
    finally:
        trainer.parts.close()


def test_a_judge_in_turn_with_the_engine(
    start: Start, judge_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Two engines of one process: verdicts of a random judge, learnt from like others."""
    judge = (f"judge.model={judge_dirs['qwen2']}", "judge.kind=sglang", "judge.cache=")
    more = ("objective.kl_coef=0.01", "train.trace_steps=-1", "train.steps=2")
    finish(start("turns", "rollout.engine=sglang", *judge, *more), tmp_path / "turns.log")
    steps = step_lines(tmp_path / "turns")
    assert len(steps) == 2
    assert all(line["judge/model_calls"] > 0 and line["judge/faults"] == 0 for line in steps)
    assert_close_to_trainer(tmp_path / "turns")
    spans = {
        (event["cat"], event["name"])
        for event in json_of(tmp_path / "turns" / "trace.json")["traceEvents"]
        if event["ph"] == "X"
    }
    turns = {("generate", "sleep"), ("judge", "wake"), ("judge", "grade"), ("judge", "sleep")}
    assert turns | {("generate", "generate"), ("push", "bucket"), ("learn", "learn")} <= spans
