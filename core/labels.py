"""What a supervised example answers: its label, or one of the label's ancestors."""

from __future__ import annotations

from dataclasses import dataclass

from speciarl.core.examples import Example
from speciarl.judge.taxonomy import Taxonomy
from speciarl.rollout.seeds import uniforms


@dataclass(frozen=True)
class SftConfig:
    """The supervised stage. Steps, batch and optimizer are the run's own sections."""

    levels: tuple[float, ...] = (1.0,)
    """Probability of answering with the label, its parent, its grandparent, ..."""
    template: str = "<answer>{}</answer>"
    """The completion; {} is the label."""

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 0 or abs(sum(self.levels) - 1) > 1e-6:
            raise ValueError(f"levels={self.levels}: probabilities that add up to 1")
        if self.template.count("{}") != 1:
            raise ValueError(f"template={self.template!r} must hold {{}} exactly once")


def label_of(
    example: Example, levels: tuple[float, ...], taxonomy: Taxonomy | None, seed: int, step: int
) -> str:
    """The label an example is taught with at this step, drawn by counter.

    A level above the root is the root.

    Raises:
        ValueError: ancestors wanted, but the label has no taxonomy entry.
    """
    draw, level, total = float(uniforms(seed, step, example.key, 0, 1)[0]), 0, 0.0
    for level, share in enumerate(levels):  # noqa: B007  the last level takes what is left
        total += share
        if draw < total:
            break
    if level == 0:
        return example.truth.lower() if len(levels) > 1 else example.truth
    node = taxonomy.find(example.truth) if taxonomy is not None else None
    if taxonomy is None or node is None:
        raise ValueError(f"sft.levels needs a taxonomy entry for {example.truth!r}")
    line = taxonomy.ancestors(node)
    return taxonomy.names[line[min(level, len(line)) - 1]] if line else taxonomy.names[node]
