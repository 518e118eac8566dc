"""A judge's model from its folder or hub name: found, told apart, sized, loaded."""

from __future__ import annotations

import hashlib
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import cached_file

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_READ = {".json", ".jinja", ".model", ".txt"}
_WEIGHTS = {".safetensors", ".bin"}
_SAMPLES, _SAMPLE = 64, 4096  # of each file of weights: how many, and of how many bytes


def find_model(model: str | PathLike[str]) -> Path:
    """The folder with the config.json of `model`, a folder or a name on the hub (owner/name).

    Raises FileNotFoundError naming the model, and where it was looked for.
    """
    folder = Path(model)
    if folder.is_dir():
        if _holds_model(folder):
            return folder
        inside = folder / "model"  # of a run folder, whose own config.json holds the settings
        hint = f"; did you mean {inside}?" if _holds_model(inside) else ""
        raise FileNotFoundError(
            f"judge model {str(model)!r}: no config.json of a model in it{hint}"
        )
    if not _HUB_NAME.fullmatch(str(model)) or folder.parent.is_dir():
        raise FileNotFoundError(
            f"judge model {str(model)!r}: there is no such folder (a name on the hub is owner/name)"
        )
    try:
        return Path(str(cached_file(str(model), "config.json"))).parent
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"judge model {str(model)!r}: no such folder, and not to be had from the hub: {reason}"
        ) from None


def _holds_model(folder: Path) -> bool:
    """Whether the config.json in `folder` says what kind of model it is of."""
    file = folder / "config.json"
    try:
        return file.is_file() and "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False


def digest_of(folder: Path) -> str:
    """A hash of configuration, tokenizer, and size and samples of the weights: cheap for any size,
    the same for every copy, another one after training. A snapshot from the hub, of which only
    what was needed may be there, is known by its commit."""
    if folder.parent.name == "snapshots":
        return folder.name[:16]
    found = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in _READ | _WEIGHTS):
        size = file.stat().st_size
        found.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            if file.suffix in _READ or size <= _SAMPLES * _SAMPLE:
                found.update(stream.read())
                continue
            for i in range(_SAMPLES):
                stream.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
                found.update(stream.read(_SAMPLE))
    return found.hexdigest()[:16]


def device_of(name: str) -> torch.device:
    """The device called `name`; "auto" is this process's CUDA device, or the CPU without one.

    Raises ValueError naming the setting.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"judge device {name!r}: use auto, cpu, cuda or cuda:0") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"judge device {name!r}: no CUDA device is visible; use cpu or auto")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"judge device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", index)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bf16 on CUDA and fp32 elsewhere. Raises ValueError."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"judge dtype {name!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    model: str | PathLike[str], dtype: torch.dtype, device: torch.device, attention: str = "auto"
) -> Any:
    """The language model, or the image-text model, in `model`, on `device`.

    attention: of transformers ("sdpa", "eager", "flash_attention_2"), or "auto" for its choice.
    Raises ValueError for a model that writes no text, MemoryError before loading what cannot fit.
    """
    config = AutoConfig.from_pretrained(model)
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise ValueError(
            f"judge model {str(model)!r} is of type {config.model_type}, which is neither a causal "
            "language model nor an image-text-to-text model"
        )
    options = {} if attention == "auto" else {"attn_implementation": attention}
    with torch.device("meta"):
        empty = kind.from_config(config)
    needed = sum(p.numel() for p in empty.parameters()) * dtype.itemsize
    free = _free(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"judge model {str(model)!r} takes {needed / 2**30:.1f} GiB in {dtype}, and "
            f"{free / 2**30:.1f} GiB are free on {device}: use a smaller judge, another device, "
            "a shorter dtype, or a server"
        )
    return kind.from_pretrained(model, dtype=dtype, **options).to(device)


def _free(device: torch.device) -> int | None:
    """Free bytes of a device, None where they cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text())
    return int(found[1]) * 1024 if found else None
