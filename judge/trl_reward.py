"""The best-of-N reward in TRL: `GRPOTrainer(reward_funcs=TRLReward(...))`.

    judge = make_judge("taxonomy", taxonomy="cub-200-2011")
    reward = TRLReward(judge, RewardSpec("speciarl-guarded"), num_generations=10)
    trainer = GRPOTrainer(model, reward_funcs=reward, train_dataset=..., args=GRPOConfig(
        num_generations=10, ...))

The data set needs a column with the ground truth, `truth` unless named otherwise. Completions are
judged between their answer tags.
"""

from typing import Any

import numpy as np
import torch.distributed as dist

from speciarl.judge.base import Judge
from speciarl.judge.grading import codes_of
from speciarl.judge.group_rewards import group_rewards
from speciarl.kernels.codes import ABSENT
from speciarl.kernels.reward import RewardSpec


class TRLReward:
    """A reward function of TRL that sees whole groups, over all processes.

    TRL hands each process its slice of the completions; a group's are neighbours, and may lie on
    two processes. Codes are exchanged, so the call is collective there, as TRL makes it. A
    completion that could not be judged gets None: TRL leaves it out. Rewards: see
    `group_rewards.group_rewards`.
    """

    __name__ = "speciarl"

    def __init__(
        self, judge: Judge, rule: RewardSpec, *, num_generations: int, truth: str = "truth"
    ) -> None:
        """num_generations: as GRPOConfig has it, for evaluation too; truth: a data set column.
        Raises ValueError for fewer than one generation."""
        if num_generations < 1:
            raise ValueError(f"num_generations = {num_generations} must be at least 1")
        self.judge, self.rule = judge, rule
        self.num_generations, self.truth = num_generations, truth

    def __call__(self, **columns: Any) -> list[float | None]:
        """One reward per completion. columns: what TRL gives, the data set's among it, repeated
        per completion; `completions` are texts, or conversations whose last message is the answer.

        Raises ValueError without the truth's column, or where neighbours are no groups.
        """
        if self.truth not in columns:
            raise ValueError(
                f"the data set has no column {self.truth!r}: name the one with the ground truth, "
                "TRLReward(..., truth=COLUMN)"
            )
        truths = [str(truth) for truth in columns[self.truth]]
        answers = columns["completions"]
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in answers]
        mine = list(zip(truths, codes_of(self.judge, truths, texts).tolist(), strict=True))
        parts = _exchanged(mine)
        rewards = self._rewards([one for part in parts for one in part])
        rank = dist.get_rank() if len(parts) > 1 else 0
        first = sum(map(len, parts[:rank]))
        if "log_metric" in columns:
            unscored = np.mean([code == ABSENT for _, code in mine])
            columns["log_metric"]("judge/unscored", float(unscored))
        own = rewards[first : first + len(mine)]
        return [None if np.isnan(reward) else float(reward) for reward in own]

    def _rewards(self, answers: list[tuple[str, int]]) -> np.ndarray:
        size = self.num_generations
        groups = [answers[i : i + size] for i in range(0, len(answers), size)]
        for group in groups:
            if len(group) != size or len({truth for truth, _ in group}) > 1:
                raise ValueError(
                    f"{len(answers)} completions are no groups of {size} neighbours with one truth:"
                    " num_generations must be GRPOConfig's (num_generations_eval too)"
                )
        codes = np.array([[code for _, code in group] for group in groups], dtype=np.int8)
        return group_rewards(codes, self.rule).reshape(-1)


def _exchanged(mine: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Every process's answers, in the order of the ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
