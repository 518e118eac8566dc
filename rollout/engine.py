"""What a rollout engine takes and gives, and the protocol that every engine follows.

A prompt is processed once, before it comes here: engine and trainer see the same ids and pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

FinishReason = Literal["stop", "length"]


class EngineDead(RuntimeError):
    """The engine can no longer generate: it was closed, it died, or its logits are not finite."""


class WeightsRefused(RuntimeError):
    """A weight push was incomplete or did not fit; the engine waits for a complete one."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One image question, processed once. Compared by identity.

    Raises ValueError when the shapes do not fit together.
    """

    key: str
    """Stable name of the example; random numbers are drawn from it."""
    input_ids: Tensor
    """[L] int64 on the CPU, every image placeholder expanded to its number of features."""
    positions: Tensor
    """[3, L] int64: M-RoPE rows (time, height, width); three equal rows for other models."""
    images: dict[str, Tensor]
    """Model inputs by name, concatenable along dim 0: `pixel_values` [patches, D] fp32,
    `image_grid_thw` [images, 3] int64. Empty for text only."""
    truth: str
    dataset: str = ""
    domain: str = ""

    def __post_init__(self) -> None:
        length = self.input_ids.numel()
        if self.input_ids.ndim != 1 or length == 0:
            shape = tuple(self.input_ids.shape)
            raise ValueError(f"prompt {self.key!r}: input_ids must be [L], L > 0, not {shape}")
        if tuple(self.positions.shape) != (3, length):
            shape = tuple(self.positions.shape)
            raise ValueError(f"prompt {self.key!r}: positions must be [3, {length}], not {shape}")

    @property
    def next_position(self) -> int:
        """Position, in all three rows, of the first generated token; each later one adds 1.

        Equal to `get_rope_index` of Qwen2.5-VL and Qwen3-VL on the whole sequence.
        """
        return int(self.positions.max()) + 1


@dataclass(frozen=True, eq=False)
class Request:
    """Samples wanted from one prompt. Raises ValueError when none, or one twice, is wanted."""

    prompt: Prompt
    group_key: str
    """Rollouts with one group key form one advantage group, whatever their prompts."""
    sample_ids: tuple[int, ...]
    """Distinct numbers of the samples; each draws its own random numbers."""

    def __post_init__(self) -> None:
        if not self.sample_ids or len(set(self.sample_ids)) != len(self.sample_ids):
            raise ValueError(
                f"group {self.group_key!r}: sample_ids must be distinct and at least one, "
                f"not {self.sample_ids}"
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ValueError naming the field with an impossible value."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the most likely tokens that reach this probability; 1 is off."""
    top_k: int = 0
    """The k most likely tokens; 0 is off. Applied before `top_p`."""
    max_new_tokens: int = 32
    stop_text: str = ""
    """A completion ends with the token that completes this text, which may go on after it; "" is
    off. See `stops.TextStop`."""
    seed: int = 0
    """Of the run."""
    step: int = 0
    """Of the training step; with seed, prompt key and sample id it names a random stream."""

    def __post_init__(self) -> None:
        limits = {
            "temperature": 0 <= self.temperature < float("inf"),
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, within in limits.items():
            if not within:
                raise ValueError(f"sampling.{name} = {getattr(self, name)} is not possible")


@dataclass(eq=False)
class Rollout:
    """One completion."""

    prompt: Prompt
    group_key: str
    sample_id: int
    ids: list[int]
    """Generated tokens; when `finish_reason` is "stop", the last one is the stop token, or the one
    that completes `Sampling.stop_text`."""
    logprobs: list[float]
    """One per id, nats, fp32: log_softmax(logits / temperature) with the banned ids masked, not
    cut by top_p or top_k; at temperature 1 for greedy."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that produced it."""


@dataclass(eq=False)
class Group:
    """All rollouts with one group key, in the order of the requests and their sample ids."""

    group_key: str
    rollouts: list[Rollout] = field(default_factory=list)


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from a policy whose weights are pushed into it."""

    about: str
    """What it is, in a line for the run's record."""
    ranks: int
    """Neighbouring ranks that share the engine: the first of them gets their prompts, the others
    take part in its other calls."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Yield each group as soon as its last rollout is finished."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Take over the weights of a checkpoint's names; wakes an engine that sleeps.

        Collective over the engine's ranks. Raises WeightsRefused; then no rollout comes until a
        complete push.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory to others."""
        ...

    def wake(self) -> None:
        """Take the memory back."""
        ...

    def check(self) -> None:
        """Raises EngineDead when the engine cannot go on."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
