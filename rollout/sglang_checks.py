"""What must hold before an engine is started: each error names the setting to change."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from speciarl.rollout.sglang_contract import examine
from speciarl.rollout.sglang_needs import MODELS
from speciarl.rollout.sglang_source import installed

OLDEST, NEXT = (0, 5, 17), (0, 6, 0)
SUPPORTED = "0.5.17 (torch 2.11) to 0.5.21 (torch 2.13)"


@dataclass(frozen=True)
class Features:
    """What the installed SGLang can do, found by looking at it."""

    version: str
    arguments: frozenset[str]
    """Names that the engine's constructor takes."""
    weight_sessions: bool
    """Weight updates must stand between begin_weight_update and end_weight_update."""
    memory_saver: bool
    """Sleeping frees memory on a CUDA device."""

    def describe(self) -> str:
        """One line for the log: the versions, and what is missing."""
        lacks = [] if self.memory_saver else ["memory saver (no sleeping on a GPU)"]
        lacks += [] if self.weight_sessions else ["weight-update sessions (not needed)"]
        found = f"SGLang {self.version}, torch {torch.__version__}"
        return f"{found}; lacks {', '.join(lacks)}" if lacks else found


def find() -> Features:
    """Imports SGLang and looks at it. Call it where the process is protected (sglang_scope).

    Raises ImportError when it is missing, cannot be imported, or is of an unsupported version:
    one outside the known range, or one without something that is needed (sglang_contract).
    """
    package = installed()
    try:
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.server_args import ServerArgs
        from sglang.version import __version__
    except Exception as error:  # whatever its dependencies raise
        raise ImportError(
            f"SGLang is installed but cannot be imported: {type(error).__name__}: {error}; "
            f"supported are {SUPPORTED} with the transformers that they pin"
        ) from error
    require_supported(__version__)
    report = examine(package)
    if not report.conforms:
        lacking = ", ".join(f"{lack.what} ({lack.file})" for lack in report.failures)
        raise ImportError(
            f"SGLang {__version__} is not supported, it has no {lacking}; supported are {SUPPORTED}"
        )
    return Features(
        version=__version__,
        arguments=frozenset(inspect.signature(ServerArgs).parameters),
        weight_sessions=hasattr(Engine, "begin_weight_update"),
        memory_saver=importlib.util.find_spec("torch_memory_saver") is not None,
    )


def require_supported(version: str) -> None:
    """Raises ImportError for a version of SGLang outside the known range."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not OLDEST <= found < NEXT:
        raise ImportError(f"SGLang {version} is not supported; supported are {SUPPORTED}")


def require_arguments(given: Iterable[str], features: Features) -> None:
    """Raises ValueError for a server argument that this version does not have."""
    for name in given:
        if name not in features.arguments:
            near = get_close_matches(name, features.arguments, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"SGLang {features.version} has no server argument {name!r}{hint}")


def require_memory_saver(features: Features) -> None:
    """Raises ImportError if an engine on a CUDA device could not sleep."""
    if not features.memory_saver:
        raise ImportError(
            "an SGLang engine that shares its GPU must sleep, and its memory saver is missing: "
            "pip install torch_memory_saver"
        )


def require_shareable_memory(environment: Mapping[str, str]) -> None:
    """Raises ValueError if an engine could not read weights in this process's GPU memory."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").lower():
            raise ValueError(
                f"{name}={environment[name]}: expandable segments cannot be shared with an SGLang "
                "engine, which reads pushed weights there: unset it"
            )


def require_known_model(folder: Path) -> None:
    """Raises ValueError if SGLang has no class for the model in `folder` (config.json)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wanted = config.get("architectures") or []
    known = installed().classes(MODELS)
    if not set(wanted) & set(known):
        near = get_close_matches(wanted[0], known, n=1) if wanted else []
        hint = f"; the nearest that it has is {near[0]}" if near else ""
        raise ValueError(
            f"SGLang has no class for model {str(folder)!r} (architectures {wanted}){hint}: "
            "use another model, or another engine or judge"
        )


def require_port(port: int) -> None:
    """Raises ValueError if nothing could listen on `port` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"port = {port} cannot be used by the SGLang engine ({error}): "
                "give another first port, or none: any that is free"
            ) from None


def free_port() -> int:
    """A TCP port nobody listens on at the moment of the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_room(folder: Path, ranks: int, free: int, fraction: float) -> None:
    """Raises MemoryError if the weights in `folder` leave no room for keys and values.

    ranks: GPUs that share the weights. free: bytes free on each. fraction: the share of them that
    the engine may take.
    """
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / ranks
    if weights >= fraction * free:
        raise MemoryError(
            f"the weights of {str(folder)!r} take {weights / 2**30:.1f} GiB on each GPU, and the "
            f"engine may take memory = {fraction:g} of the {free / 2**30:.1f} GiB that are free "
            "there: raise memory, use more GPUs (tp_size), or a smaller model"
        )
