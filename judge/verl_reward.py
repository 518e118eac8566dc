"""The best-of-N reward in verl: a batch reward function.

    reward_model.reward_manager=batch
    custom_reward_function.path=.../judge/verl_reward.py
    custom_reward_function.name=compute_score
    +custom_reward_function.reward_kwargs.judge.kind=taxonomy
    +custom_reward_function.reward_kwargs.judge.taxonomy=cub-200-2011
    +custom_reward_function.reward_kwargs.rule=speciarl-guarded

verl's batch reward manager shows the function all completions at once but not which belong to one
prompt: every row's `extra_info` must hold `index`, as verl's own data preparation writes it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from speciarl.judge.base import Judge
from speciarl.judge.grading import codes_of
from speciarl.judge.group_rewards import group_rewards
from speciarl.judge.registry import make_judge
from speciarl.kernels.codes import ABSENT, NAMES
from speciarl.kernels.reward import RewardSpec


def compute_score(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[str],
    extra_infos: Sequence[Mapping[str, Any]],
    *,
    judge: Mapping[str, Any],
    rule: str = "speciarl-guarded",
    **settings: Any,
) -> list[dict[str, Any]]:
    """A dictionary per completion: `score`, its reward, and `category`.

    judge: the keywords of `registry.make_judge`, with `kind`; made once. rule, settings: of
    `RewardSpec`. A group is the completions with one data source and one `extra_info["index"]`.
    verl knows no missing reward: a completion that could not be judged gets the mean of its group,
    so that it learns nothing and moves nobody's mean (0 where nothing was judged).
    Rewards: see `group_rewards.group_rewards`.

    Raises ValueError for a row without `index`, an unknown setting, or what the judge raises.
    """
    grader = _judge(tuple(sorted((key, _frozen(value)) for key, value in judge.items())))
    spec = RewardSpec(rule, **settings)
    codes = codes_of(grader, [str(truth) for truth in ground_truths], list(solution_strs))
    scores = np.zeros(len(codes))
    for rows in _groups(data_sources, extra_infos).values():
        rewards = group_rewards(codes[rows][None], spec)[0]
        scored = rewards[~np.isnan(rewards)]
        scores[rows] = np.where(np.isnan(rewards), scored.mean() if len(scored) else 0.0, rewards)
    return [
        {"score": float(score), "category": NAMES[int(code)], "judged": int(code != ABSENT)}
        for score, code in zip(scores, codes, strict=True)
    ]


def _groups(
    data_sources: Sequence[str], extra_infos: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for row, (source, info) in enumerate(zip(data_sources, extra_infos, strict=True)):
        if not isinstance(info, Mapping) or info.get("index") is None:
            raise ValueError(
                f"row {row}: extra_info has no 'index', which tells whose completion it is; write "
                "it into the data set, one number per prompt"
            )
        groups.setdefault((str(source), str(info["index"])), []).append(row)
    return groups


def _frozen(value: Any) -> Any:
    return tuple(value) if not isinstance(value, (str, int, float, bool)) else value


@cache
def _judge(options: tuple[tuple[str, Any], ...]) -> Judge:
    named = dict(options)
    if "kind" not in named:
        raise ValueError(f"judge: no kind among {', '.join(named)}; as in kind=taxonomy")
    return make_judge(named.pop("kind"), **named)
