"""The guard between the engine's log-probs and the trainer's: what alarms, what stops, what not."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runs import json_of, lot, open_trainer, run_config, step_lines
from speciarl.core.mismatch import (
    FLOOR,
    WINDOW,
    Found,
    MismatchConfig,
    MismatchGuard,
    mismatch_scalars,
)
from speciarl.core.trainer import Trainer, TrainingStopped
from speciarl.core.world import World
from speciarl.kernels.loss import STATS, LossSpec, policy_loss

OFF = MismatchConfig(alarm=0, jump=0, stop=0, min_ess=0)
Push = Callable[[Trainer], None]


@pytest.fixture(autouse=True)
def judged_by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speciarl.core.collect.codes_of", lot)


def judged(guard: MismatchGuard, mean: float, ess: float = 1.0) -> Found:
    return guard.judge({"mismatch/mean": mean, "mismatch/ess": ess})


def test_the_figures_of_a_step() -> None:
    """Against their definitions, over two sequences of different weight."""
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(50, generator=rng).double()
    engine = old + 0.3 * torch.randn(50, generator=rng).double()
    _, stats = policy_loss(
        old,
        old,
        engine=engine,
        advantages=torch.ones(2),
        weights=torch.tensor([0.1, 2.0]),
        sequence_ids=torch.arange(50) % 2,
        spec=LossSpec(kl_coef=0.0, importance_cap=1.2),
    )
    weights = (old - engine).exp()
    wanted = {
        "mismatch/mean": (old - engine).abs().mean(),
        "mismatch/max": (old - engine).abs().max(),
        "mismatch/k1": (engine - old).mean(),
        "mismatch/k3": (weights - 1 - weights.log()).mean(),
        "mismatch/ess": weights.sum() ** 2 / (50 * weights.square().sum()),
        "mismatch/importance": weights.clamp(max=1.2).mean(),
    }
    found = mismatch_scalars(dict(zip(STATS, stats.tolist(), strict=True)))
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()})
    assert mismatch_scalars({"tokens": 3.0, "engine_weight_squared": 0.0}) == {}


def test_one_sample_that_outweighs_all_others() -> None:
    stats = dict.fromkeys(STATS, 0.0) | {"tokens": 100.0, "engine_k1": -30.0}
    stats |= {"engine_k3": math.expm1(30) - 30, "engine_weight_squared": 99 + math.exp(60)}
    assert mismatch_scalars(stats)["mismatch/ess"] == pytest.approx(0.01)


def test_a_mean_above_a_limit_alarms_or_stops() -> None:
    guard = MismatchGuard(MismatchConfig())
    assert judged(guard, 0.05) == (None, None)
    alarm, stop = judged(guard, 0.06)
    assert alarm and "0.06 nats a token (above mismatch.alarm=0.05)" in alarm and stop is None
    alarm, stop = judged(guard, 0.6)
    assert alarm and "mismatch.alarm=0.05" in alarm and "mismatch.jump=10.0" in alarm
    assert stop == "engine and trainer differ by 0.6 nats a token (mismatch.stop=0.5)"
    assert judged(guard, math.inf).stop


def test_a_jump_is_measured_against_the_steps_before() -> None:
    guard = MismatchGuard(MismatchConfig(alarm=0))
    assert judged(guard, 0.011) == (None, None)  # nothing was before
    for mean in (0.001, 0.002, 0.003):
        assert judged(guard, mean) == (None, None)
    alarm, _ = judged(guard, 0.026)  # the median of the four is 0.0025
    assert alarm and "above mismatch.jump=10.0 times 0.0025, the median before" in alarm
    assert judged(guard, 0.026).alarm == alarm  # a fault that stays is told again
    for _ in range(WINDOW):
        judged(guard, 0.02)
    assert judged(guard, 0.19) == (None, None) and judged(guard, 0.21).alarm


def test_rounding_is_no_jump() -> None:
    guard = MismatchGuard(MismatchConfig())
    for mean in (0.0, 0.0, 1e-8, 1e-6, FLOOR):
        assert judged(guard, mean) == (None, None)
    assert judged(guard, 1.1 * FLOOR).alarm


def test_few_effective_samples_alarm() -> None:
    guard = MismatchGuard(MismatchConfig())
    assert judged(guard, 0.01, 0.5) == (None, None)
    alarm, stop = judged(guard, 0.01, 0.41)
    assert alarm and "0.41 effective samples, below mismatch.min_ess=0.5" in alarm and stop is None


def test_what_is_off_says_nothing() -> None:
    guard = MismatchGuard(OFF)
    for mean in (1e-7, 100.0, math.nan):
        assert judged(guard, mean, 1e-9) == (None, None)
    assert guard.stale(1, []) is None


def test_a_figure_that_is_no_number_alarms_and_leaves_the_history() -> None:
    guard = MismatchGuard(MismatchConfig())
    judged(guard, 1e-7)
    alarm, stop = judged(guard, math.nan, math.nan)
    assert alarm and "differ by nan" in alarm and stop is None
    assert list(guard.means) == [1e-7]


def test_a_step_that_learnt_nothing_says_nothing() -> None:
    guard = MismatchGuard(MismatchConfig())
    assert guard.judge({"time/step": 1.0}) == (None, None) and not guard.means


# Runs of the native engine.


def without_push(trainer: Trainer, *, stamped: bool) -> Callable[[], None]:
    """Lets the next pushes be lost, told by the stamp or not; returns what ends that."""
    engine = trainer.parts.engine
    load = engine.load_weights

    def lost(tensors: object, *, version: int) -> None:
        if stamped:
            engine.weight_version = version  # type: ignore[attr-defined]

    def mend() -> None:
        engine.load_weights = load  # type: ignore[method-assign]

    engine.load_weights = lost  # type: ignore[method-assign]
    return mend


def opened(
    world: World, root: Path, model: Path, out: Path, *words: str
) -> tuple[Trainer, list[str]]:
    """A trainer that has pushed its first weights, and the messages it will give."""
    trainer = open_trainer(run_config(root, model, out, *words), world)
    told: list[str] = []
    trainer.parts.monitor.message = told.append  # type: ignore[method-assign]
    trainer.push()
    return trainer, told


def test_completions_of_other_weights_are_not_trained(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    trainer, _ = opened(world, toy_root, toy_model_dir, tmp_path / "run")
    mend = without_push(trainer, stamped=False)
    trainer.step()
    mend()
    before = {n: t.clone() for n, t in trainer.tensors().items()}
    with pytest.raises(TrainingStopped, match=r"step 1: .* weight versions \[0\]; .* not trained"):
        trainer.step()
    trainer.parts.close()
    assert all(torch.equal(value, before[name]) for name, value in trainer.tensors().items())


@pytest.mark.parametrize("words", [("optim.lr=1e-3",), ("optim.lr=1e-4",), ("optim.lr=1e-6",)])
@pytest.mark.parametrize("stamped", [False, True])
def test_a_lost_push_alarms_within_one_further_step(
    stamped: bool, words: tuple[str, ...], world: World, toy_root: Path, toy_model_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """With the stamp of weights that never came, or with the check of the stamps switched off."""
    if not stamped:
        words = (*words, "mismatch.check_versions=false")
    trainer, told = opened(world, toy_root, toy_model_dir, tmp_path / "run", *words)
    trainer.step()
    mend = without_push(trainer, stamped=stamped)
    trainer.step()
    mend()
    trainer.step()  # samples from weights that are a step old
    assert not told and trainer.progress.alarms == 0
    trainer.step()
    assert len(told) == 1 and told[0].startswith("step 3: engine and trainer differ by")
    assert "above mismatch.jump=10.0" in told[0]
    trainer.step()
    trainer.settle()
    trainer.parts.close()
    assert len(told) == 1 and trainer.progress.alarms == 1
    logged = step_lines(tmp_path / "run")
    assert [line["mismatch/alarms"] for line in logged] == [0, 0, 1, 1, 1]
    assert logged[2]["mismatch/mean"] > FLOOR > 20 * logged[3]["mismatch/mean"]
    assert logged[2]["mismatch/k3"] > 1e3 * logged[3]["mismatch/k3"] > 0
    assert logged[2]["mismatch/max"] > logged[2]["mismatch/mean"]


@pytest.mark.parametrize(
    "words", [(), ("optim.lr=1e-4", "train.prompts=4"), ("objective.importance_cap=2.0",)]
)
def test_a_healthy_run_never_alarms(
    words: tuple[str, ...], world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    """With two updates in a step too: the engine is held against the policy that sampled."""
    trainer, told = opened(world, toy_root, toy_model_dir, tmp_path / "run", *words)
    for _ in range(8):
        trainer.step()
    trainer.settle()
    trainer.parts.close()
    logged = step_lines(tmp_path / "run")
    assert not told and len(logged) == 8
    for line in logged:
        assert line["mismatch/alarms"] == 0 and line["mismatch/mean"] < FLOOR / 20
        assert line["mismatch/ess"] == pytest.approx(1, abs=1e-5)
        assert line["mismatch/importance"] == pytest.approx(1, abs=1e-5)
        assert abs(line["mismatch/k1"]) < 1e-5 and 0 < line["mismatch/k3"] < 1e-10


def test_alarms_are_counted_over_a_resume_and_the_history_starts_anew(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    given = (world, toy_root, toy_model_dir, tmp_path / "run", "mismatch.alarm=1e-9")
    trainer, told = opened(*given)
    trainer.step()
    trainer.step()
    trainer.save()
    trainer.parts.close()
    assert len(told) == 2 and len(trainer.guard.means) == 2
    again, told = opened(*given)
    again.resume()
    assert again.progress.alarms == 2 and not again.guard.means
    again.push()
    again.step()
    again.settle()
    again.parts.close()
    assert [line["mismatch/alarms"] for line in step_lines(tmp_path / "run")] == [1, 2, 3]


def test_a_mismatch_over_the_limit_stops_the_run(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    words = ("mismatch.stop=0.001", "rollout.temperature=1.0")
    trainer, told = opened(world, toy_root, toy_model_dir, tmp_path / "run", *words)
    trainer.parts.learner.temperature = 1.3  # not the one that the engine samples with
    with pytest.raises(TrainingStopped, match="step 1: engine and trainer differ") as stopped:
        trainer.run()
    trainer.parts.close()
    assert "mismatch.stop=0.001" in str(stopped.value)
    rows = json_of(tmp_path / "run" / "stopped-at-step-1.json")
    assert str(tmp_path / "run" / "stopped-at-step-1.json") in str(stopped.value)
    assert [row["step"] for row in rows] == [0, 0, 1, 1]
    assert all(len(row["ids"]) == len(row["codes"]) == 3 for row in rows)
