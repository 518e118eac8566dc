"""Engines by name. Adding one is adding a file and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speciarl.rollout.engine import RolloutEngine
from speciarl.rollout.stops import ANSWER_END


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "native"
    """"native": transformers' model with this package's own loop."""
    n: int = 10
    """Completions of each prompt: the group."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    max_new_tokens: int = 2048
    """Length limit of a completion."""
    stop_at_answer: bool = False
    """A completion ends with `</answer>`, not only with the end of turn; in evaluation too. Saves
    what comes after an answer, which is then neither trained nor judged."""
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
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature}: training samples need a positive temperature"
            )

    @property
    def stop_text(self) -> str:
        """Of `Sampling`."""
        return ANSWER_END if self.stop_at_answer else ""


def _native(model: Any, config: RolloutConfig, **tokens: Any) -> RolloutEngine:
    from speciarl.rollout.native import NativeEngine

    return NativeEngine(model, max_rows=config.max_rows, keep_weights=not config.sleep, **tokens)


ENGINES: dict[str, Callable[..., RolloutEngine]] = {"native": _native}


def make_engine(config: RolloutConfig, model: Any, **tokens: Any) -> RolloutEngine:
    """The engine named by the configuration.

    Args:
        config: its settings.
        model: a transformers model on the device that the engine may own.
        tokens: stop_ids, banned_ids, and the tokenizer's decode for a stop text.
    """
    return ENGINES[config.engine](model, config, **tokens)
