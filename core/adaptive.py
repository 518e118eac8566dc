"""Adaptive N: which groups of a step get further completions, and how many.

An image's bar is the best category among its rollouts (SpeciaRL, section 3): how well it is known
depends on how many there are. So every image gets a few completions, and those images get more
whose bar is still uncertain, round after round, until none is or the step's budget is spent. The
paper leaves this open; rule and shares are ours.

What it costs in principle: a group that stops when its bar is certain has a size that depends on
its outcomes. It tends to end with a success, so its mean reward overstates the policy's, the more
so the rarer the success; its deviation is off as well. With a baseline that does not depend on the
group, stopping would only weigh an image by its expected number of completions (Wald's identity);
with the group's own mean the gradient is biased: the overstated mean takes credit from the very
successes that ended the group. And since every completion's tokens weigh the same in the loss,
images with many completions weigh more in the update.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from speciarl.kernels.codes import FORMAT, A, G, S, W


def uncertain(codes: np.ndarray) -> np.ndarray:
    """bool [G]: groups of `codes` [G, N] int8 whose bar further completions may well move.

    No rollout was judged better than generic (or none was judged at all), or a single one reaches
    the bar. Format failures and ABSENT codes do not count.
    """
    judged = (codes >= W) & (codes < FORMAT)
    best = np.where(judged, codes, W).max(axis=1, keepdims=True)
    reaching = (judged & (codes >= best.clip(A, S))).sum(axis=1)
    return (best[:, 0] <= G) | (reaching == 1)


def top_up(
    codes: np.ndarray, asked: np.ndarray, budget: int, *, size: int, most: int
) -> np.ndarray:
    """int64 [G]: completions that each group gets in the next round; all 0 ends the step.

    Every uncertain group gets `size`, at most what it lacks to `most`. Where the budget is too
    small for that they get equal shares, and what cannot be divided goes one each to those that
    come first (prompt order is shuffled). A function of its arguments alone, which are the same
    on every rank.

    Args:
        codes: [G, N] int8 of all ranks' verdicts so far, in prompt order; N >= 1.
        asked: [G] completions asked for so far, whether the engine gave them or not.
        budget: completions that may be asked for in the whole step, at least `asked.sum()`.
    """
    room = np.where(uncertain(codes), most - asked, 0).clip(0, size)
    left = budget - int(asked.sum())
    level = size
    while np.minimum(room, level).sum() > left:
        level -= 1
    more = np.minimum(room, level)
    more[np.flatnonzero(room > level)[: left - int(more.sum())]] += 1
    return more


@dataclass(frozen=True)
class Spent:
    """What the rounds of a step came to, over all ranks; counts that add up over refills."""

    prompts: int = 0
    empty: int = 0
    """Prompts of which the engine gave no completion at all: they are left out."""
    rounds: int = 0
    asked: int = 0
    """Completions asked for ..."""
    budget: int = 0
    """... of so many that could have been."""
    uncertain: int = 0
    """Prompts whose bar was uncertain at the end."""
    lost: int = 0
    """Completions asked for that the engine did not give."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scalars(self, adaptive: bool) -> dict[str, float]:
        """groups/empty, completions/lost (counts); where N is adaptive also rounds (a count), and
        the shares of prompts still uncertain and of the budget used."""
        found = {"groups/empty": float(self.empty), "completions/lost": float(self.lost)}
        if adaptive:
            found["adaptive/rounds"] = float(self.rounds)
            found["adaptive/uncertain"] = self.uncertain / max(self.prompts, 1)
            found["adaptive/budget_used"] = self.asked / max(self.budget, 1)
        return found
