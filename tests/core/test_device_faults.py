"""Bad values that only the device sees: counted with the step, read one step late, then a stop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learning import CASES, judged_groups, learner_of
from runs import json_of, open_trainer, run_config, step_lines
from speciarl.core.learner import Learned
from speciarl.core.objective import ObjectiveConfig
from speciarl.core.report import Deferred
from speciarl.core.trainer import TrainingStopped
from speciarl.core.world import World
from speciarl.kernels import faults
from speciarl.kernels.loss import STATS
from tiny import Tiny


def learned(*counts: int) -> Learned:
    return Learned(
        torch.zeros(len(STATS)), torch.ones(1), torch.zeros(1), torch.tensor(counts).int(), 1
    )


@pytest.fixture(scope="module")
def tiny(model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs["toy"], pictures)


def test_a_batch_packed_wrongly_is_counted(
    tiny: Tiny, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["two updates"]
    learner = learner_of(case, tiny, world)
    pack = learner._pack

    def wrong(chosen: Any) -> Any:
        batch = pack(chosen)
        ids = batch.sequence_ids.clone()
        ids[0] = len(chosen)
        return replace(batch, sequence_ids=ids)

    monkeypatch.setattr(learner, "_pack", wrong)
    groups = judged_groups(tiny, case.codes)
    with pytest.raises(ValueError, match="sequence_ids holds"):
        learner.learn(groups, lambda _: case.lr)
    with faults.deferred():  # as on a device
        found = learner.learn(groups, lambda _: case.lr)
    assert found is not None and not found.skipped.any()
    micro = sum(len(mini.micro) for mini in learner.plan(groups))
    assert found.faults.tolist() == [0, 0, 0, micro, 0]
    assert not faults.take("cpu").any()


def test_counts_arrive_with_the_statistics_of_their_step() -> None:
    deferred = Deferred(torch.device("cpu"))
    deferred.put(4, {}, learned(0, 0, 0, 0, 0))
    assert deferred.take()[3] is None  # type: ignore[index]
    deferred.put(5, {}, learned(0, 2, 0, 0, 0))
    step, _, _, message = deferred.take()  # type: ignore[misc]
    assert step == 5 and message is not None and "2 targets that are banned" in message
    deferred.put(6, {}, None)
    assert deferred.take() == (6, {}, [], None)


def test_the_run_stops_with_the_message(
    world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path
) -> None:
    trainer = open_trainer(run_config(toy_root, toy_model_dir, tmp_path / "run"), world)
    trainer.recent.append([{"step": 0}])
    trainer.deferred.put(1, {"time/step": 1.0}, learned(0, 0, 0, 0, 3))
    with pytest.raises(TrainingStopped, match="step 1 .* 3 category codes outside") as stopped:
        trainer.settle()
    trainer.parts.close()
    inputs = tmp_path / "run" / "stopped-at-step-0.json"
    assert str(inputs) in str(stopped.value) and json_of(inputs) == [{"step": 0}]
    assert [line["step"] for line in step_lines(tmp_path / "run")] == [1]  # it is logged before


@pytest.mark.parametrize("algorithm", ["cispo", "gspo"])
def test_the_other_losses_learn(algorithm: str, tiny: Tiny, world: World) -> None:
    """The first of two updates has ratio 1, the second does not; neither is skipped."""
    case = replace(
        CASES["two updates"], objective=ObjectiveConfig(algorithm, dynamic_sampling=False)
    )
    learner = learner_of(case, tiny, world)
    before = {n: p.detach().clone() for n, p in learner.policy.parameters().items()}
    found = learner.learn(judged_groups(tiny, case.codes), lambda _: case.lr)
    assert found is not None and not found.skipped.any() and not found.faults.any()
    stats = dict(zip(STATS, found.stats.tolist(), strict=True))
    assert stats["ratio"] != pytest.approx(stats["tokens"], abs=0.1)
    assert stats["clipped_high"] > 0
    after = learner.policy.parameters()
    assert any(not torch.equal(after[n], value) for n, value in before.items())
