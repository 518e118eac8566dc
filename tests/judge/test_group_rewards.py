import ast
import inspect
from importlib.util import find_spec
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest

from speciarl.judge.group_rewards import group_rewards
from speciarl.judge.registry import make_judge
from speciarl.judge.trl_reward import TRLReward
from speciarl.judge.verl_reward import compute_score
from speciarl.kernels.codes import ABSENT, CODES, FORMAT, S, W
from speciarl.kernels.reward import RULES, RewardSpec, best_of_n_numpy

TREE = '{"nodes": [{"name": "bird"}, {"name": "robin", "parent": "bird"}]}'
TAKEN = [rule for rule in RULES if rule != "table"]


@pytest.mark.parametrize("rule", TAKEN)
def test_a_wrong_answer_is_never_above_the_mean_of_its_group(rule: str) -> None:
    spec = RewardSpec(rule)
    groups = np.array(list(combinations_with_replacement(CODES, 5)), dtype=np.int8)
    groups = groups[(groups != ABSENT).any(axis=1)]
    rewards = group_rewards(groups, spec)
    plain = best_of_n_numpy(groups, spec, normalize=True).rewards
    assert np.array_equal(np.isnan(rewards), groups == ABSENT)
    same = (groups != ABSENT) & (groups != FORMAT)
    assert np.array_equal(rewards[same], plain[same])
    above = rewards - np.nanmean(rewards, axis=1, keepdims=True)
    raised = (groups == W) & (above > 1e-6)
    assert raised.any() == spec.keeps_format  # the published rules have that flaw, and keep it


@pytest.fixture(scope="module")
def taxonomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tree") / "birds.json"
    file.write_text(TREE)
    return str(file)


def tagged(*answers: str) -> list[str]:
    return [f"<answer>{answer}</answer>" for answer in answers]


def test_trl_gets_groups_of_neighbours(taxonomy: str) -> None:
    judge = make_judge("taxonomy", taxonomy=taxonomy)
    reward = TRLReward(judge, RewardSpec("speciarl-guarded"), num_generations=2, truth="label")
    texts = [*tagged("robin", "bird"), *tagged("bird", "car")]
    assert reward(prompts=[""] * 4, completions=texts, label=["robin"] * 4) == [1, 0, 1, 0]
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(prompts=[""] * 4, completions=talk, label=["robin"] * 4) == [1, 0, 1, 0]
    # A truth that the judge does not know is a fault, not a zero.
    assert reward(prompts=[""] * 2, completions=texts[:2], label=["wren"] * 2) == [None, None]


def test_trl_hears_what_is_missing(taxonomy: str) -> None:
    judge = make_judge("taxonomy", taxonomy=taxonomy)
    reward = TRLReward(judge, RewardSpec(), num_generations=2)
    with pytest.raises(ValueError, match="no column 'truth'"):
        reward(prompts=[""], completions=tagged("robin"), label=["robin"])
    for truths in (["robin"] * 3, ["robin", "bird"]):
        with pytest.raises(ValueError, match="no groups of 2 neighbours"):
            reward(prompts=[], completions=tagged(*truths), truth=truths)
    with pytest.raises(ValueError, match="num_generations = 0"):
        TRLReward(judge, RewardSpec(), num_generations=0)


def verl(taxonomy: str, answers: list[str], indices: list[int], **how: object) -> list[dict]:
    """The call of verl's BatchRewardManager.verify (verl/workers/reward_manager/batch.py)."""
    return compute_score(
        data_sources=["birds"] * len(answers),
        solution_strs=tagged(*answers),
        ground_truths=["robin"] * len(answers),
        extra_infos=[{"index": index, "rollout_reward_scores": {}} for index in indices],
        **{"judge": {"kind": "taxonomy", "taxonomy": taxonomy}, **how},  # type: ignore[arg-type]
    )


def test_verl_groups_by_index(taxonomy: str) -> None:
    found = verl(taxonomy, ["robin", "bird", "bird", "car"], [0, 1, 0, 1])
    assert [one["score"] for one in found] == [1.0, 1.0, 0.0, 0.0]
    assert found[0]["category"] == "specific" and all(one["judged"] for one in found)
    ordered = verl(taxonomy, ["robin", "car"], [0, 0], rule="speciarl-ordered", wrong_penalty=0.25)
    assert [one["score"] for one in ordered] == [1.0, -0.25]


def test_verl_gets_the_mean_for_what_was_not_judged(
    taxonomy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(judge: object, truths: object, texts: list[str]) -> np.ndarray:
        return np.array([S, W, ABSENT], dtype=np.int8)

    monkeypatch.setattr("speciarl.judge.verl_reward.codes_of", faulty)
    found = verl(taxonomy, ["robin", "car", "robin"], [0, 0, 0])
    assert [one["score"] for one in found] == [1.0, 0.0, 0.5] and not found[2]["judged"]


def test_verl_hears_what_is_missing(taxonomy: str) -> None:
    with pytest.raises(ValueError, match="row 0: extra_info has no 'index'"):
        compute_score(
            ["birds"], tagged("robin"), ["robin"], [{}],
            judge={"kind": "taxonomy", "taxonomy": taxonomy},
        )  # fmt: skip
    with pytest.raises(ValueError, match="no kind among taxonomy"):
        verl(taxonomy, ["robin"], [0], judge={"taxonomy": taxonomy})


def test_verl_calls_the_function_by_these_names() -> None:
    package = find_spec("verl")
    if package is None:
        pytest.skip("verl is not installed")
    (folder,) = package.submodule_search_locations or ()
    source = Path(folder, "workers", "reward_manager", "batch.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "compute_score"
    ]
    named = {keyword.arg for call in calls for keyword in call.keywords}
    ours = inspect.signature(compute_score).parameters
    required = {name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD}
    assert len(calls) == 1 and named == required | {None}  # None: **reward_kwargs
