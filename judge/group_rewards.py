"""The best-of-N reward as a number per completion, for trainers that make their own advantages."""

import numpy as np

from speciarl.kernels.codes import ABSENT, FORMAT, W
from speciarl.kernels.reward import RewardSpec, best_of_n_numpy


def group_rewards(codes: np.ndarray, rule: RewardSpec) -> np.ndarray:
    """Rewards [G, N] float32 of `codes` [G, N] int8; nan where ABSENT.

    Those trainers take (r - mean) / std over all completions of a group, format failures among
    them, and a failure's penalty would then lift the wrong answers beside it above the mean. So
    where a group has a wrong answer, a format failure gets no less than it: the wrong answer's
    reward is then the lowest of its group, and its advantage at most 0. The published rules
    (`RewardSpec.keeps_format`) stay as they were published.
    Raises ValueError if `codes` is not int8 [G, N] or holds an unknown code.
    """
    rewards = np.array(best_of_n_numpy(codes, rule, normalize=True).rewards)
    if not rule.keeps_format:
        wrong = np.where(codes == W, rewards, np.inf).min(axis=1, keepdims=True)
        floor = np.where(np.isinf(wrong), -np.inf, wrong)
        rewards = np.where(codes == FORMAT, np.maximum(rewards, floor), rewards)
    return np.where(codes == ABSENT, np.nan, rewards).astype(np.float32)
