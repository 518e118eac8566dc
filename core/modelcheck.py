"""A look at a model folder before it is loaded: is it one, is it whole, is it the one of before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from speciarl.core.policy import ModelConfig

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_model(config: ModelConfig) -> None:
    """Looks at a model folder before anything is loaded; what is no folder is left to the hub.

    Raises:
        FileNotFoundError, ValueError: naming the folder or the file at fault.
    """
    folder = Path(config.folder)
    if not folder.is_dir():
        # A hub name is owner/name; runs/model is a path where there is a folder runs.
        if not HUB_NAME.fullmatch(config.folder) or folder.parent.is_dir():
            raise FileNotFoundError(f"model.path={config.path!r}: there is no folder {folder}")
        return
    if not _is_model(folder):
        models = (folder / "model", folder.parent.parent / "model")  # of a run, of a checkpoint
        near = next((path for path in models if _is_model(path)), None)
        hint = f"; the run's model is in {near}" if near else ""
        raise FileNotFoundError(
            f"model.path={config.path!r}: {folder} has no config.json with a model_type{hint}"
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):  # checks the header against the size
                pass
        except SafetensorError as error:
            raise ValueError(f"model.path={config.path!r}: {file} is corrupted: {error}") from None


def _is_model(folder: Path) -> bool:
    """Whether the folder has a model's config.json; a run folder has one of another kind."""
    file = folder / "config.json"
    return file.is_file() and '"model_type"' in file.read_text(encoding="utf-8", errors="replace")


def model_record(config: ModelConfig) -> dict[str, Any]:
    """What tells a model's predictions from another's, retraining in the same folder included."""
    folder = Path(config.folder)
    if not folder.is_dir():
        return {"model": config.folder}
    stats = {file.name: file.stat() for file in sorted(folder.glob("*.safetensors"))}
    weights = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return {"model": str(folder.resolve()), "weights": weights}
