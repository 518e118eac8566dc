"""Generate and judge: groups in order, judge faults left out, dynamic sampling."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runs import lot, open_trainer, run_config, step_lines
from speciarl.core.collect import Collector, JudgedGroup, codes_matrix
from speciarl.core.examples import Example
from speciarl.core.trainer import Trainer, TrainingStopped
from speciarl.core.world import World
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.settings import JudgeConfig
from speciarl.judge.taxonomy import TaxonomyJudge
from speciarl.kernels.codes import ABSENT, FORMAT, S, W
from speciarl.rollout.engine import Group, Prompt, Request, Rollout, Sampling


class BackwardEngine:
    """Yields the groups last first, and the samples of each in the wrong order."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        for request in reversed(requests):
            rollouts = [
                Rollout(request.prompt, request.group_key, i, [i, 9], [-1.0, -2.0], "stop", 4)
                for i in reversed(request.sample_ids)
            ]
            yield Group(request.group_key, rollouts)

    def wake(self) -> None: ...


class SlowJudge:
    """Right is who says the number of a sample, and sample 2 cannot be judged."""

    identity = "slow"
    concurrent = True

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        time.sleep(0.05)
        codes = {"0": W, "1": S, "2": None}
        return [Verdict(codes[pair.prediction], "number") for pair in pairs]

    def tally(self) -> dict[str, float]:
        return {}


def collector(judge: object, workers: int = 2) -> Collector:
    def decode(ids: list[int]) -> str:
        return f"<answer>{ids[0]}</answer>" if ids[0] < 3 else "no answer"

    builder, config = SimpleNamespace(decode=decode), JudgeConfig(workers=workers)
    return Collector(BackwardEngine(), judge, builder, config)  # type: ignore[arg-type]


def work(count: int) -> list[tuple[Example, Prompt]]:
    out = []
    for i in range(count):
        ids = torch.arange(5 + i)
        prompt = Prompt(f"d/{i}", ids, ids.expand(3, -1), {}, "robin")
        out.append((Example(f"d/{i}", Path("x.png"), "robin", "d", "birds"), prompt))
    return out


def test_groups_come_in_the_order_of_the_work_and_samples_in_theirs() -> None:
    machine = collector(SlowJudge())
    groups, timing = machine.collect(work(3), 4, Sampling())
    machine.close()
    assert [group.example.key for group in groups] == ["d/0", "d/1", "d/2"]
    assert [group.prompt_tokens for group in groups] == [5, 6, 7]
    for group in groups:
        assert [c.ids for c in group.completions] == [[i, 9] for i in range(4)]
        assert [c.code for c in group.completions] == [W, S, ABSENT, FORMAT]
        assert {(c.finish, c.version) for c in group.completions} == {("stop", 4)}
    assert timing.tokens == 3 * 4 * 2 and timing.judge > 0


def test_nothing_to_do_is_no_error() -> None:
    machine = collector(SlowJudge())
    assert machine.collect([], 4, Sampling())[0] == []
    machine.close()


def test_an_error_of_the_judge_reaches_the_caller() -> None:
    class Broken(SlowJudge):
        def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
            return []

    machine = collector(Broken())
    with pytest.raises(RuntimeError, match="judge slow returned 0 verdicts for 3 pairs"):
        machine.collect(work(1), 3, Sampling())
    machine.close()


def test_a_group_that_the_engine_keeps_back_is_noticed() -> None:
    machine = collector(SlowJudge())
    machine.engine.generate = lambda requests, sampling: iter(())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="ended without 2 groups, d/0 among them"):
        machine.collect(work(2), 3, Sampling())
    machine.close()


def test_codes_of_groups_of_different_size_are_padded() -> None:
    machine = collector(SlowJudge())
    groups = [machine.collect(work(1), n, Sampling())[0][0] for n in (1, 3)]
    machine.close()
    matrix = codes_matrix(groups)
    assert matrix.dtype == np.int8
    assert matrix.tolist() == [[W, ABSENT, ABSENT], [W, S, ABSENT]]


@pytest.fixture
def trainer(world: World, toy_root: Path, toy_model_dir: Path, tmp_path: Path, request) -> Iterator:  # type: ignore[no-untyped-def]
    """A trainer with the words of the test's parameter, its first weights pushed."""
    config = run_config(toy_root, toy_model_dir, tmp_path / "run", *request.param)
    made = open_trainer(config, world)
    made.push()
    yield made
    made.parts.close()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def unchanged(trainer: Trainer, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in trainer.tensors().items())


@pytest.mark.parametrize("trainer", [("objective.kl_coef=0.0",)], indirect=True)
def test_what_cannot_be_scored_is_left_out(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First one group without any verdict, then one with two of three, then no verdict at all."""
    before = weights(trainer)
    monkeypatch.setattr(
        TaxonomyJudge,
        "grade",
        lambda self, pairs: [Verdict(None, "timeout") for _ in pairs],
    )
    monkeypatch.setattr("speciarl.judge.grading.parse_answer", lambda text: text)
    table = iter([[ABSENT] * 3, [W, S, ABSENT]])
    with monkeypatch.context() as patch:
        patch.setattr("speciarl.core.collect.codes_of", lambda *given: np.int8(next(table)))
        groups, _ = trainer.rounds.collect(0)
    plan = trainer.parts.learner.plan(groups)
    scored = [(s.example.key, s.completion.code) for s in plan[0].sequences]
    assert scored == [(groups[1].example.key, W), (groups[1].example.key, S)]
    lengths = [len(c.ids) for c in groups[1].completions[:2]]
    assert {s.weight for s in plan[0].sequences} == {1 / sum(lengths)}

    with pytest.raises(TrainingStopped, match="step 0: 6 of 6 .* the judge reported timeout .6."):
        trainer.step()  # the judge, asked in earnest, can say nothing
    assert unchanged(trainer, before) and trainer.progress.updates == 0
    assert trainer.parts.store.steps() == [0]  # what the run had come to is saved


@pytest.mark.parametrize(
    "trainer", [("objective.kl_coef=0.0", "optim.weight_decay=0.5")], indirect=True
)
def test_groups_without_signal_make_no_update(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "speciarl.core.collect.codes_of",
        lambda judge, truths, texts: np.int8([S] * len(texts)),
    )
    before = weights(trainer)
    trainer.step()
    trainer.settle()
    assert unchanged(trainer, before) and trainer.progress.updates == 0
    assert trainer.progress.step == 1
    line = step_lines(tmp_path / "run")[0]
    assert line["groups/no_signal"] == 1 and line["tokens_per_s/learn"] == 0
    trainer.step()  # and the run goes on


DAPO = ("objective.algorithm=dapo", "train.prompts=4", "train.mini_batch=2")


def with_signal_every(
    n: int, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> list[JudgedGroup]:
    """Lets each n-th group have signal; returns the list into which sampled groups will go."""
    sampled: list[JudgedGroup] = []
    sample = trainer.rounds.sample

    def sampling(examples: list[Example], step: int) -> object:
        groups, timing = sample(examples, step)
        for group in groups:
            codes = [S, W, W] if n and len(sampled) % n == 0 else [W, W, W]
            for completion, code in zip(group.completions, codes, strict=True):
                object.__setattr__(completion, "code", code)
            sampled.append(group)
        return groups, timing

    monkeypatch.setattr(trainer.rounds, "sample", sampling)
    return sampled


@pytest.mark.parametrize("trainer", [DAPO], indirect=True)
def test_dynamic_sampling_refills_with_groups_that_have_signal(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = with_signal_every(3, monkeypatch, trainer)
    groups, timing = trainer.rounds.collect(0)
    assert len(sampled) == 12 and len({group.example.key for group in sampled}) == 12
    assert groups == sampled[::3]
    assert trainer.parts.stream.position == 12
    assert timing.tokens == sum(len(c.ids) for g in sampled for c in g.completions)


@pytest.mark.parametrize("trainer", [(*DAPO, "objective.max_refills=2")], indirect=True)
def test_dynamic_sampling_gives_up_with_whole_mini_batches(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = with_signal_every(4, monkeypatch, trainer)  # 3 of the 12 that three rounds bring
    groups, _ = trainer.rounds.collect(0)
    assert len(sampled) == 12 and groups == sampled[:8:4]


@pytest.mark.parametrize(
    "trainer", [(*DAPO, "objective.max_refills=9", "data.train.birds.k=6")], indirect=True
)
def test_dynamic_sampling_takes_no_prompt_twice_and_lives_without_any_signal(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = with_signal_every(0, monkeypatch, trainer)
    before = weights(trainer)
    trainer.step()
    keys = [group.example.key for group in sampled]
    assert len(keys) == len(set(keys)) <= 6
    assert unchanged(trainer, before) and trainer.progress.updates == 0


@pytest.mark.parametrize("trainer", [()], indirect=True)
def test_judge_faults_here_and_there_do_not_stop_learning(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def faulty(judge: object, truths: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        codes = lot(judge, truths, texts)
        codes[::2] = ABSENT
        return codes

    monkeypatch.setattr("speciarl.core.collect.codes_of", faulty)
    before = weights(trainer)
    trainer.step()
    trainer.settle()
    assert not unchanged(trainer, before)
    line = step_lines(tmp_path / "run")[0]
    assert line["rate/unscored"] == pytest.approx(2 / 3)
    assert sum(v for name, v in line.items() if name.startswith("rate/")) == pytest.approx(5 / 3)
