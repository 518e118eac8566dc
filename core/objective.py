"""What is maximised: GRPO and its relatives as settings of one policy loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from speciarl.kernels.loss import KINDS, LossSpec

AGGREGATIONS = ("token-mean", "sequence-mean", "constant")

# clip_low, clip_high, kl_coef, normalize, aggregation, dynamic_sampling
ALGORITHMS: dict[str, dict[str, float | bool | str]] = {
    "grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.01,
        "normalize": True,
        "aggregation": "token-mean",
        "dynamic_sampling": False,
    },
    "dr-grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.0,
        "normalize": False,
        "aggregation": "constant",
        "dynamic_sampling": False,
    },
    "dapo": {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_coef": 0.0,
        "normalize": True,
        "aggregation": "token-mean",
        "dynamic_sampling": True,
    },
    # No lower bound, no KL, DAPO's dynamic sampling (MiniMax-M1, section 3.1). It names no upper
    # bound; a weight of at most 5 is what ScaleRL (2510.13786) uses.
    "cispo": {
        "clip_low": 1.0,
        "clip_high": 4.0,
        "kl_coef": 0.0,
        "normalize": True,
        "aggregation": "token-mean",
        "dynamic_sampling": True,
    },
    # Section 5.1 of the paper; its objective is the mean over sequences, and has no KL.
    "gspo": {
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
        "normalize": True,
        "aggregation": "sequence-mean",
        "dynamic_sampling": False,
    },
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy loss. A field left at none takes the algorithm's value."""

    algorithm: str = "grpo"
    """"grpo", "dr-grpo" (arXiv 2503.20783), "dapo" (arXiv 2503.14476), "cispo" (arXiv
    2506.13585: clips the weight of a token's gradient, drops none) or "gspo" (arXiv 2507.18071:
    one ratio for a whole completion)."""
    clip_low: float | None = None
    """The ratio is clipped at 1 - clip_low; at most 1, which is no bound ..."""
    clip_high: float | None = None
    """... and at 1 + clip_high."""
    dual_clip: float | None = 3.0
    """Bound of the loss of a negative advantage, in units of it (arXiv 1912.09729); none: off.
    "cispo" has no use for it."""
    kl: str = "k3"
    """Estimator of the KL to the reference: "k1", "k2" or "k3"."""
    kl_coef: float | None = None
    """Weight of the KL in the loss; 0 needs no reference model."""
    normalize: bool | None = None
    """Divides advantages by the group's standard deviation."""
    aggregation: str | None = None
    """"token-mean", "sequence-mean" or "constant" (by the length limit, Dr.GRPO)."""
    dynamic_sampling: bool | None = None
    """Draws further prompts until the batch is full of groups with signal (DAPO)."""
    max_refills: int = 4
    """Rounds of dynamic sampling before a smaller batch is accepted."""
    importance_cap: float | None = None
    """Cap of the weight that corrects the engine's log-probs to the trainer's; none: off."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm={self.algorithm!r}: one of {', '.join(ALGORITHMS)}")
        for name, value in ALGORITHMS[self.algorithm].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation!r}: one of {', '.join(AGGREGATIONS)}")
        if self.max_refills < 0:
            raise ValueError(f"max_refills={self.max_refills}: must not be negative")
        self.loss  # noqa: B018  a LossSpec checks its own numbers

    @property
    def loss(self) -> LossSpec:
        """The part that the kernel needs."""
        assert self.clip_low is not None and self.clip_high is not None
        assert self.kl_coef is not None
        return LossSpec(
            kind=self.algorithm if self.algorithm in KINDS else "grpo",
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            kl=self.kl,
            kl_coef=self.kl_coef,
            importance_cap=self.importance_cap,
            entropy_coef=self.entropy_coef,
        )


def sequence_weights(lengths: Sequence[int], aggregation: str, limit: int) -> list[float]:
    """The weight of each token of each scored completion in a mini-batch's loss.

    Args:
        lengths: tokens of every scored completion of the mini-batch, over all ranks, groups
            without signal included: the denominator counts them although they are not computed.
        aggregation: "token-mean": 1 / all tokens; "sequence-mean": 1 / (sequences x own
            tokens); "constant": 1 / (sequences x limit), Dr.GRPO (arXiv 2503.20783, section 3).
        limit: the completion length limit in tokens.
    """
    if aggregation == "token-mean":
        return [1.0 / sum(lengths)] * len(lengths)
    if aggregation == "sequence-mean":
        return [1.0 / (len(lengths) * length) for length in lengths]
    return [1.0 / (len(lengths) * limit)] * len(lengths)
