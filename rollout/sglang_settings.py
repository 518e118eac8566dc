"""How an SGLang engine is started, and the checks of it that need no engine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from speciarl.rollout import sglang_checks as checks

_CPU_ARGUMENTS: Mapping[str, object] = {
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 65_536,  # a share of the host's memory, as on a GPU, would be far too much
}


@dataclass(frozen=True)
class Launch:
    """How an engine is started. Raises ValueError naming the field."""

    model: Path
    """Folder in HF layout."""
    device: str
    """"cpu" or "cuda"."""
    dtype: str = "auto"
    """Of the weights. "auto" is SGLang's choice: the checkpoint's own, but fp16 if that is fp32."""
    seed: int = 0
    """Of the run; the engine of rank r gets seed + r."""
    memory: float = 0.0
    """Share of the GPU memory free at start that weights, keys and values may take; 0 is SGLang's
    choice."""
    sleeps: bool = False
    """Memory is released by sleeping; needs the memory saver on CUDA, does nothing on a CPU."""
    keep_weights: bool = False
    """Sleeping weights are kept on the host; without, they must be pushed again."""
    start_timeout: float = 900.0
    """Seconds."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Further server arguments by SGLang's names ("tp_size", "quantization", "attention_backend",
    "max_total_tokens", ...). "port" is that of local rank 0, rank r takes port + r; without it,
    any that is free. An engine has tp_size GPUs, from its rank's own on."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the engine's processes, such as SGLANG_VLM_CACHE_SIZE_MB."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device = {self.device!r} of an SGLang engine: use cpu or cuda")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory = {self.memory}: must be from 0 to below 1")
        for name in ("tp_size", "port"):
            value = self.arguments.get(name, 1)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} = {value!r}: must be a number from 1 on")

    @property
    def tp_size(self) -> int:
        """GPUs that share the engine's weights."""
        return int(str(self.arguments.get("tp_size", 1)))

    @property
    def variables(self) -> dict[str, str]:
        """The environment that SGLang is started with, beyond the process's own."""
        if self.device != "cpu":
            return dict(self.environment)
        cores = os.cpu_count() or 1
        bound = "|".join(str(rank % cores) for rank in range(self.tp_size))
        shared = {"SGLANG_CPU_OMP_THREADS_BIND": bound} if self.tp_size > 1 else {}
        return {"SGLANG_USE_CPU_ENGINE": "1", **shared, **self.environment}

    def check(self, features: checks.Features) -> None:
        """Raises ValueError (model class, argument), ImportError (memory saver), MemoryError."""
        checks.require_known_model(self.model)
        checks.require_arguments(self.arguments, features)
        if self.device == "cuda":
            if self.sleeps:
                checks.require_memory_saver(features)
            if self.memory and "quantization" not in self.arguments:
                free = torch.cuda.mem_get_info()[0]
                checks.require_room(self.model, self.tp_size, free, self.memory)

    def server_arguments(self, rank: int, local: int) -> dict[str, object]:
        """What the engine's constructor gets in rank `rank`, the `local`-th of its machine.

        Raises ValueError for a port that is taken, and for more GPUs than there are.
        """
        cuda, sleeps = self.device == "cuda", self.sleeps and self.device == "cuda"
        if cuda and local + self.tp_size > torch.cuda.device_count():
            raise ValueError(
                f"tp_size = {self.tp_size} of the SGLang engine in local rank {local}: this "
                f"machine has {torch.cuda.device_count()} GPUs"
            )
        wanted = self.arguments.get("port")
        port = checks.free_port() if wanted is None else int(str(wanted)) + local
        checks.require_port(port)
        arguments: dict[str, object] = {
            "model_path": str(self.model),
            "device": self.device,
            "dtype": self.dtype,
            "random_seed": self.seed + rank,
            "base_gpu_id": local if cuda else 0,
            "log_level": "error",
            "skip_server_warmup": True,
            "grammar_backend": "none",
            "sleep_on_idle": True,  # an idle engine leaves the processor to the trainer
            "enable_memory_saver": sleeps,
            "enable_weights_cpu_backup": sleeps and self.keep_weights,
        }
        if self.memory:
            arguments["mem_fraction_static"] = self.memory
        arguments |= {} if cuda else _CPU_ARGUMENTS
        return arguments | dict(self.arguments) | {"port": port, "nccl_port": port}


def parse_arguments(words: str) -> dict[str, object]:
    """Server arguments from text, as in "tp_size=2 quantization=fp8 enable_torch_compile=true".

    Numbers, true, false and null are values of that kind, all else is text. Raises ValueError for a
    word that is not key=value.
    """
    found: dict[str, object] = {}
    for word in words.split():
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise ValueError(f"server_args: {word!r} is not of the form key=value")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found
