"""What a training step is made of: seconds and amounts of work by name, the same for every trainer.

Hooks on transformers' own modules count what passes through them, so a figure means the same
thing whoever calls the model: image patches through the vision tower, tokens through the language
model when prompts are read ("prefill"), when the reference scores and when the policy learns.
"""

from __future__ import annotations

import functools
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class StepRecord:
    """One training step.

    parts: seconds of step, generate, judge, learn, push and other, which add up to step.
    detail: seconds within the parts. work: patches, tokens and rows computed.
    """

    parts: dict[str, float]
    cpu: float
    """Seconds of processor time of all threads: a busy machine changes them less."""
    detail: dict[str, float]
    work: dict[str, int]
    samples: int
    completion_tokens: int
    """Sampled tokens, stop tokens included."""
    learn_tokens: int
    """Tokens of the sequences that were learnt from: prompt and completion."""

    @classmethod
    def of(cls, parts: dict[str, float], meter: Meter, **counts: int) -> StepRecord:
        """A record from all parts but "other", and what the meter saw since `start`."""
        cpu = time.process_time() - meter.cpu
        seconds, work = meter.take()
        for phase, whole in (("learn", "policy forward"), ("reference", "reference")):
            inside = sum(seconds.get(f"{part}, {phase}", 0) for part in ("vision", "language"))
            if whole in seconds:
                seconds[f"head and rest, {phase}"] = seconds[whole] - inside
        named = {name: parts[name] for name in ("generate", "judge", "learn", "push")}
        step = parts["step"]
        all_parts = {"step": step, **named, "other": max(0.0, step - sum(named.values()))}
        return cls(all_parts, cpu, seconds, work, **counts)


class Meter:
    """Collects seconds and amounts until they are taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[str, int] = defaultdict(int)
        self.began = self.cpu = 0.0

    def start(self) -> None:
        """Begins a step: forgets what was seen and reads the clocks."""
        self.take()
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> float:
        """Wall seconds since `start`."""
        return time.perf_counter() - self.began

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """(seconds, amounts) by name since the last call."""
        taken = dict(self.seconds), dict(self.work)
        self.seconds.clear()
        self.work.clear()
        return taken

    def timed(self, name: str | Callable[[], str], function: Callable[..., Any]) -> Any:
        """`function`, its host seconds counted under `name` (or the name it returns)."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            label = name if isinstance(name, str) else name()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[label] += time.perf_counter() - start
            return result

        return run

    def watch(
        self,
        module: nn.Module,
        name: Callable[[dict[str, Any]], str],
        amount: Callable[[tuple[Any, ...], dict[str, Any]], int],
    ) -> None:
        """Counts seconds and `amount` of every forward of `module` under `name(kwargs)`."""
        starts: list[float] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.work[name(kwargs)] += amount(args, kwargs)
            starts.append(time.perf_counter())

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.seconds[name(kwargs)] += time.perf_counter() - starts.pop()

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    def watch_model(self, model: Any, *, samples: bool) -> None:
        """Watches a transformers image-text model.

        Args:
            samples: it samples when there is no gradient; otherwise it scores.
        """
        self.watch(
            model.model.visual,
            lambda kwargs: f"vision, {_phase(samples)}",
            lambda args, kwargs: len(args[0] if args else kwargs["hidden_states"]),
        )
        self.watch(
            model.model.language_model,
            lambda kwargs: f"language, {_phase(samples, kwargs['inputs_embeds'].shape[1] == 1)}",
            lambda args, kwargs: kwargs["inputs_embeds"].shape[:2].numel(),
        )
        if samples:
            model.get_output_embeddings().register_forward_hook(self._count_rows)

    def _count_rows(self, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            self.work["rows sampled"] += out.shape[:-1].numel()


def _phase(samples: bool, one_token: bool = False) -> str:
    if torch.is_grad_enabled():
        return "learn"
    if not samples:
        return "reference"
    return "decode" if one_token else "prefill"


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most ever allocated since the last reset, else the process's peak."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
