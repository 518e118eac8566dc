"""How far the rollout engine's log-probs are from the trainer's, and what is done about it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from speciarl.core.collect import JudgedGroup

Scalars = dict[str, float]

WINDOW = 20
"""Steps whose median a jump is measured against."""
FLOOR = 1e-4
"""Nats a token that no jump is below. In fp32 the engine and the trainer of the toy world differ by
at most 1.6e-7 in any of 160 steps, short runs of random models by up to 1e-6: ten times that is
rounding still. One lost push makes 1.3e-2 to 1.6e-2 at a learning rate of 1e-4, and 1.3e-4 to
1.6e-4 at 1e-6."""
HINT = "look for a lost weight push, or sampling settings that the trainer does not share"


@dataclass(frozen=True)
class MismatchConfig:
    """The guard between the rollout engine's log-probs and the trainer's of the same tokens."""

    check_versions: bool = True
    """Refuses completions of other weights than the policy's before anything is learnt; false
    leaves them to the log-probs."""
    alarm: float = 0.05
    """Mean |engine - trainer| in nats a token above which the run warns; 0 is off."""
    jump: float = 10.0
    """Warns when the mean is above this many times the median of up to 20 steps before; 0 is
    off. Means up to 1e-4 nats, which fp32 rounding does not reach, never count as a jump."""
    stop: float = 0.5
    """Mean above which the run stops; 0 is off."""
    min_ess: float = 0.5
    """Effective share of the samples below which the run warns, (sum w)^2 / (tokens sum w^2) of
    w = exp(trainer - engine); 0 is off."""

    def __post_init__(self) -> None:
        for name in ("alarm", "stop"):
            if not getattr(self, name) >= 0:  # nan too
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative; 0 is off")
        if not (self.jump == 0 or self.jump > 1):
            raise ValueError(f"jump={self.jump}: must be above 1; 0 is off")
        if not 0 <= self.min_ess <= 1:
            raise ValueError(f"min_ess={self.min_ess}: must be in [0, 1]; 0 is off")


def mismatch_scalars(stats: Scalars) -> Scalars:
    """The figures of a step, from the sums of `kernels.loss.STATS`.

    mean, max: |engine - trainer|, nats; k1, k3: KL(engine || trainer) by Schulman's estimators,
    nats a token; ess: effective share of the samples, in (0, 1]; importance: mean truncated
    weight, 1 where the objective has none. Nothing where no log-probs of an engine were given.
    """
    tokens, squares = stats["tokens"], stats["engine_weight_squared"]
    if not squares:
        return {}
    weights = tokens + stats["engine_k3"] - stats["engine_k1"]
    return {
        "mismatch/mean": stats["engine_mismatch"] / tokens,
        "mismatch/max": stats["engine_mismatch_max"],
        "mismatch/k1": stats["engine_k1"] / tokens,
        "mismatch/k3": stats["engine_k3"] / tokens,
        "mismatch/ess": min(weights**2 / (tokens * squares), 1.0),  # rounding can pass 1
        "mismatch/importance": stats["importance_weight"] / tokens,
    }


class Found(NamedTuple):
    """What a step's figures say: a warning, and why the run must stop; None is nothing."""

    alarm: str | None
    stop: str | None


class MismatchGuard:
    """Judges each step by the limits and by the steps before it.

    The steps before are those of this process: after a resume the first step has no jump to make,
    and every later one is measured against what came since.
    """

    def __init__(self, config: MismatchConfig) -> None:
        self.config = config
        self.means: deque[float] = deque(maxlen=WINDOW)

    def stale(self, step: int, groups: Sequence[JudgedGroup]) -> str | None:
        """Why these groups must not be learnt from in this step, by their weight versions."""
        versions = {c.version for group in groups for c in group.completions}
        if not self.config.check_versions or versions <= {step}:
            return None
        return (
            f"step {step}: completions were sampled with weight versions {sorted(versions)}; "
            "a weight push was lost, and the step was not trained"
        )

    def judge(self, scalars: Scalars) -> Found:
        """Alarm and reason to stop of a step whose `mismatch_scalars` these are, or hold.

        A step that jumped does not join the history, so that a fault which stays is told at every
        step. A step that learnt nothing has no figures, and says nothing.
        """
        mean = scalars.get("mismatch/mean")
        if mean is None:
            return Found(None, None)
        apart = f"engine and trainer differ by {mean:.3g} nats a token"
        jump = self._jump(mean)
        reasons = [jump, self._over(mean), self._few(scalars["mismatch/ess"])]
        if jump is None and math.isfinite(mean):
            self.means.append(mean)
        told = "; ".join(reason for reason in reasons if reason)
        limit = self.config.stop
        return Found(
            f"{apart} ({told}): {HINT}" if told else None,
            f"{apart} (mismatch.stop={limit})" if limit and mean > limit else None,
        )

    def _over(self, mean: float) -> str | None:
        limit = self.config.alarm
        return f"above mismatch.alarm={limit}" if limit and not mean <= limit else None  # nan too

    def _jump(self, mean: float) -> str | None:
        factor = self.config.jump
        if not (factor and self.means and mean > FLOOR):
            return None
        usual = median(self.means)
        above = f"above mismatch.jump={factor} times {usual:.3g}, the median before"
        return above if mean > factor * usual else None

    def _few(self, ess: float) -> str | None:
        least = self.config.min_ess
        few = f"a share of {ess:.2g} effective samples, below mismatch.min_ess={least}"
        return few if least and not ess >= least else None
