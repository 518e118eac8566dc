"""Engines by name. Adding one is adding a file and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speciarl.rollout.engine import RolloutEngine


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "native"
    """"native": transformers' model with this package's own loop."""
    n: int = 10
    """Completions of each prompt: the group. With `n_start`, their mean at most: a step's prompts
    times n are its budget."""
    n_start: int = 0
    """Adaptive N: completions that every prompt gets first; those whose bar is uncertain then get
    as many again and again, up to `n_max`, while the budget lasts. 0: each gets n at once."""
    n_max: int = 0
    """Most completions of a prompt where N is adaptive; 0 otherwise."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    max_new_tokens: int = 2048
    """Length limit of a completion."""
    sleep: bool = False
    """Frees the engine's weights while the policy learns: less memory, a slower push."""
    max_rows: int = 256
    """Completions decoded at once."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            near = difflib.get_close_matches(self.engine, ENGINES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"engine={self.engine!r}: one of {', '.join(ENGINES)}{hint}")
        if self.n < 1 or self.max_new_tokens < 1 or self.max_rows < 1:
            raise ValueError("n, max_new_tokens and max_rows must be at least 1")
        if (self.n_start, self.n_max) != (0, 0) and not (
            1 <= self.n_start <= self.n <= self.n_max > self.n_start
        ):
            raise ValueError(
                f"n_start={self.n_start}, n={self.n}, n_max={self.n_max}: adaptive N needs "
                "1 <= n_start <= n <= n_max and n_start < n_max; both at 0 are off"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature}: training samples need a positive temperature"
            )


def _native(model: Any, config: RolloutConfig, **tokens: Any) -> RolloutEngine:
    from speciarl.rollout.native import NativeEngine

    return NativeEngine(model, max_rows=config.max_rows, keep_weights=not config.sleep, **tokens)


ENGINES: dict[str, Callable[..., RolloutEngine]] = {"native": _native}


def make_engine(config: RolloutConfig, model: Any, **tokens: Any) -> RolloutEngine:
    """The engine named by the configuration.

    Args:
        config: its settings.
        model: a transformers model on the device that the engine may own.
        tokens: stop_ids and banned_ids.
    """
    return ENGINES[config.engine](model, config, **tokens)
