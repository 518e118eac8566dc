"""Engines by name. Adding one is adding a file and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from speciarl.rollout.engine import EngineDead, RolloutEngine
from speciarl.rollout.sglang_settings import parse_arguments
from speciarl.rollout.stops import ANSWER_END

# Server arguments that other settings decide.
_OWN_ARGUMENTS = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "tp_size": "rollout.tp",
    "mem_fraction_static": "rollout.memory",
    "max_running_requests": "rollout.max_rows",
    "random_seed": "train.seed",
    "weight_version": "the trainer",
}


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "native"
    """"native": transformers' model with this package's own loop. "sglang": SGLang in this process,
    for GPUs; asleep while the policy learns."""
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
    stop_at_answer: bool = False
    """A completion ends with `</answer>`, not only with the end of turn; in evaluation too. Saves
    what comes after an answer, which is then neither trained nor judged."""
    sleep: bool | None = None
    """Frees the engine's memory while the policy learns: a slower push. none: sglang does, native
    does not."""
    max_rows: int = 256
    """Completions decoded at once."""
    memory: float = 0.5
    """sglang: share of the GPU memory free at start that weights, keys and values may take; 0 is
    SGLang's own choice. While it generates, the trainer's shards and optimizer stay beside it."""
    tp: int = 1
    """sglang: GPUs that share one engine's weights; neighbouring ranks of one machine."""
    prime: bool | None = None
    """sglang: a prompt passes once before its samples are asked for, so that all of them find it in
    the prefix cache. none: on a GPU; on a CPU it does not pay."""
    bucket_mb: int = 512
    """sglang: MiB of weights sent at once; a push takes twice that for a moment."""
    server_args: str = ""
    """sglang: further server arguments, as in "quantization=fp8 attention_backend=fa3"."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            near = difflib.get_close_matches(self.engine, ENGINES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"engine={self.engine!r}: one of {', '.join(ENGINES)}{hint}")
        for name in ("n", "max_new_tokens", "max_rows", "tp", "bucket_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
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
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory={self.memory}: must be from 0 to below 1")
        if self.engine != "sglang" and (self.tp > 1 or self.server_args):
            raise ValueError(f"engine={self.engine!r} knows no tp and no server_args: use sglang")
        if own := _OWN_ARGUMENTS.keys() & parse_arguments(self.server_args):
            name = min(own)
            raise ValueError(f"server_args: {name} is set by {_OWN_ARGUMENTS[name]}")

    @property
    def sleeps(self) -> bool:
        """Whether the engine is put to sleep while the policy learns."""
        return self.engine == "sglang" if self.sleep is None else self.sleep

    @property
    def stop_text(self) -> str:
        """Of `Sampling`."""
        return ANSWER_END if self.stop_at_answer else ""


@dataclass(frozen=True)
class Source:
    """Where an engine's first weights come from, and what it must know of the prompts."""

    folder: str
    """Checkpoint folder or hub name."""
    dtype: torch.dtype
    device: torch.device
    stop_ids: Sequence[int]
    """Tokens that end a completion."""
    banned_ids: Sequence[int]
    """Tokens never sampled and masked in the log-probs."""
    decode: Callable[[list[int]], str]
    """The tokenizer's, special tokens kept; for a stop text."""
    longest_prompt: int
    """Tokens."""
    keep_weights: bool
    """The weights must outlive sleep: the engine wakes more often than it gets new ones."""
    seed: int = 0


def _native(config: RolloutConfig, source: Source) -> RolloutEngine:
    from speciarl.rollout.native import NativeEngine

    model: Any = AutoModelForImageTextToText.from_pretrained(source.folder, dtype=source.dtype)
    return NativeEngine(
        model.to(source.device).eval(),
        stop_ids=source.stop_ids,
        banned_ids=source.banned_ids,
        decode=source.decode,
        max_rows=config.max_rows,
        keep_weights=source.keep_weights or not config.sleeps,
    )


def _sglang(config: RolloutConfig, source: Source) -> RolloutEngine:
    from huggingface_hub import snapshot_download

    from speciarl.rollout.sglang import SglangEngine, rollout_launch
    from speciarl.rollout.tensor_group import TensorGroup

    folder = Path(source.folder)
    if not folder.is_dir():
        folder = Path(snapshot_download(source.folder))

    def start() -> RolloutEngine:
        launch = rollout_launch(
            folder,
            source.device.type,
            dtype=str(source.dtype).removeprefix("torch."),
            seed=source.seed,
            memory=config.memory,
            sleeps=config.sleeps or source.keep_weights,
            keep_weights=source.keep_weights,
            most_requests=config.max_rows,
            arguments={"tp_size": config.tp, **parse_arguments(config.server_args)},
        )
        return SglangEngine(
            launch,
            stop_ids=source.stop_ids,
            banned_ids=source.banned_ids,
            decode=source.decode,
            longest=source.longest_prompt + config.max_new_tokens,
            bucket_bytes=config.bucket_mb << 20,
            primes=config.prime,
        )

    _require_context(folder, source.longest_prompt + config.max_new_tokens)
    try:
        return start() if config.tp == 1 else TensorGroup(config.tp, start)
    except (ImportError, ValueError, MemoryError, EngineDead) as error:
        raise type(error)(f"rollout.engine='sglang': {error}") from error


def _require_context(folder: Path, longest: int) -> None:
    """Raises ValueError when the model cannot hold a prompt and its completion."""
    context = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
    if longest > context:
        raise ValueError(
            f"prompts and completions of up to {longest} tokens (data.max_prompt_tokens + "
            f"rollout.max_new_tokens) do not fit into the model's context of {context}: lower "
            "data.max_prompt_tokens (fewer image tokens, too) or rollout.max_new_tokens"
        )


ENGINES: dict[str, Callable[[RolloutConfig, Source], RolloutEngine]] = {
    "native": _native,
    "sglang": _sglang,
}


def make_engine(config: RolloutConfig, source: Source) -> RolloutEngine:
    """The engine named by the configuration, with a checkpoint's weights.

    Collective over the ranks of a tensor-parallel engine. Raises what the engine raises.
    """
    return ENGINES[config.engine](config, source)
