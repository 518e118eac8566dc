"""What is learnt from, in which updates, against which old policy; one process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learning import CASES, KL, MIXED, SPARSE, Case, judged_groups, learner_of
from speciarl.core.collect import codes_matrix
from speciarl.core.learner import Learned, Learner
from speciarl.core.objective import ObjectiveConfig
from speciarl.core.world import World
from speciarl.kernels.codes import ABSENT, CODES, W
from speciarl.kernels.loss import STATS
from speciarl.kernels.reward import RULES, RewardSpec, best_of_n
from tiny import Tiny

NO_KL = ObjectiveConfig(kl_coef=0.0)


@pytest.fixture(scope="module")
def tiny(model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs["toy"], pictures)


@pytest.fixture(scope="module")
def planner(tiny: Tiny, world: World) -> Learner:
    return learner_of(Case(NO_KL), tiny, world)


def stat(learned: Learned, name: str) -> float:
    return float(learned.stats[STATS.index(name)])


def learn(case: Case, tiny: Tiny, world: World) -> Learned:
    learned = learner_of(case, tiny, world).learn(
        judged_groups(tiny, case.codes), lambda _: case.lr
    )
    assert learned is not None
    return learned


def test_the_second_of_two_updates_is_clipped(tiny: Tiny, world: World) -> None:
    """Old log-probs are taken before the first update, else every ratio would be 1."""
    two = learn(CASES["two updates"], tiny, world)
    assert len(two.norms) == len(two.skipped) == 2 and not two.skipped.any()
    assert stat(two, "clipped_low") + stat(two, "clipped_high") > 0
    assert stat(two, "ratio") != pytest.approx(stat(two, "tokens"), abs=0.1)
    one = learn(replace(CASES["two updates"], mini_batch=len(MIXED)), tiny, world)
    assert len(one.norms) == 1
    assert stat(one, "clipped_low") == stat(one, "clipped_high") == 0
    assert stat(one, "ratio") == stat(one, "tokens")


def test_importance_weights_are_of_the_policy_that_sampled(tiny: Tiny, world: World) -> None:
    """In the second of two updates too, when the policy has moved on."""
    cap = 1.2
    objective = replace(CASES["two updates"].objective, importance_cap=cap)
    case = replace(CASES["two updates"], objective=objective)
    learner, groups = learner_of(case, tiny, world), judged_groups(tiny, case.codes)
    chosen = [sample for mini in learner.plan(groups) for sample in mini.sequences]
    engine = torch.tensor([x for sample in chosen for x in sample.completion.logprobs])

    def weights() -> float:
        with torch.no_grad():
            now = learner.policy.logprobs(learner._pack(chosen), temperature=learner.temperature)
        return float((now - engine).exp().clamp(max=cap).sum())

    before = weights()
    found = learner.learn(groups, lambda _: case.lr)
    assert found is not None and stat(found, "tokens") == len(engine)
    assert stat(found, "importance_weight") == pytest.approx(before, rel=1e-5)
    assert weights() != pytest.approx(before, rel=1e-2)


def test_an_update_has_its_own_denominator(planner: Learner, tiny: Tiny) -> None:
    planner.mini_batch = 3
    groups = judged_groups(tiny, MIXED)
    minis = planner.plan(groups)
    assert len(minis) == 2
    for mini, part in zip(minis, (groups[:3], groups[3:]), strict=True):
        tokens = sum(len(c.ids) for g in part for c in g.completions if c.code != ABSENT)
        assert {s.weight for s in mini.sequences} == {1 / tokens}


def test_groups_without_signal_cost_nothing_but_count(planner: Learner, tiny: Tiny) -> None:
    planner.mini_batch = 3
    groups = judged_groups(tiny, SPARSE)
    (mini,) = planner.plan(groups)
    learnt = [sequence.completion for sequence in mini.sequences]
    assert learnt == [c for c in groups[1].completions if c.code != ABSENT]
    assert [s.slot for s in mini.sequences] == [3, 4]
    scored = [c for g in groups for c in g.completions if c.code != ABSENT]
    assert len(scored) == 8
    assert mini.sequences[0].weight == 1 / sum(len(c.ids) for c in scored)
    for sequence in mini.sequences:
        prompt = len(tiny.prompt(sequence.example).input_ids)
        assert sequence.tokens == prompt + len(sequence.completion.ids) - 1


def test_a_kl_term_moves_groups_without_signal(tiny: Tiny, world: World) -> None:
    learner = learner_of(Case(KL, mini_batch=3), tiny, world)
    (mini,) = learner.plan(judged_groups(tiny, SPARSE))
    assert len(mini.sequences) == 8  # all but the unscored one


def test_nothing_to_learn_is_no_update(planner: Learner, tiny: Tiny) -> None:
    for codes in (((W, W, W),), ((ABSENT, ABSENT, ABSENT),)):
        assert planner.learn(judged_groups(tiny, codes), lambda _: 1.0) is None


def test_an_update_without_a_scored_completion_is_left_out(planner: Learner, tiny: Tiny) -> None:
    planner.mini_batch = 1
    minis = planner.plan(judged_groups(tiny, MIXED))
    assert [len(mini.sequences) for mini in minis] == [3, 2, 3]  # groups 0, 2 and 4


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_host_and_device_agree_on_what_is_learnt(
    planner: Learner, tiny: Tiny, rule: str, normalize: bool
) -> None:
    """The host decides from its own copy of the rule which groups are computed at all."""
    table = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0) if rule == "table" else None
    planner.reward, planner.normalize = RewardSpec(rule=rule, table=table), normalize
    planner.mini_batch = 2
    draw = np.random.default_rng(0)
    for _ in range(10):
        codes = draw.choice(CODES, (6, 4), p=[0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
        groups = judged_groups(tiny, codes.tolist())
        device = best_of_n(
            torch.from_numpy(codes_matrix(groups)), planner.reward, normalize=normalize
        )
        assert np.array_equal(planner.live(groups), device.live.numpy())
        advantages = device.advantages.reshape(-1)
        planned = {s.slot for mini in planner.plan(groups) for s in mini.sequences}
        # No completion that the device gives an advantage is left out ...
        assert set(advantages.nonzero().squeeze(1).tolist()) <= planned
        # ... and no group is computed in which the device sees none.
        assert all(device.live[slot // 4] for slot in planned)
