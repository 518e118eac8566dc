"""What an SGLang engine holds of a GPU: let go of and taken back, each part in its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

WEIGHTS = ("weights", "cuda_graph")
"""SGLang's tags of what a push of weights needs ..."""
CACHE = ("kv_cache",)
"""... and of what only completions need."""


class DeviceMemory:
    """The parts of an engine's memory by SGLang's tags. The memory saver fails on a part that is
    released or resumed twice.

    Args:
        run: hands a job to the engine, as `Host.run` does.
    """

    def __init__(self, run: Callable[[Callable[[Any], Any]], Any]) -> None:
        self._run = run
        self._away: set[str] = set()

    def release(self) -> None:
        """Everything that is there leaves the device."""
        there = [tag for tag in (*CACHE, *WEIGHTS) if tag not in self._away]
        if there:
            self._run(lambda engine: engine.release_memory_occupation(there))
            self._away.update(there)

    def take(self, tags: Sequence[str]) -> None:
        """These parts are on the device again; what they hold is undefined."""
        wanted = [tag for tag in tags if tag in self._away]
        if wanted:
            torch.cuda.empty_cache()
            self._run(lambda engine: engine.resume_memory_occupation(wanted))
            self._away.difference_update(wanted)
