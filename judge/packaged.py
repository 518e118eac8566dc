"""Taxonomies that ship with the package, by name: judge/taxonomies/<name>.json."""

from difflib import get_close_matches
from importlib import resources
from os import PathLike
from pathlib import Path


def resolve(path: str | PathLike[str]) -> Path:
    """The taxonomy file that `path` means.

    A bare name (no folder, no suffix ".json") is that of a packaged taxonomy, or else of a file in
    the working folder; anything else is a path and is not looked at.
    Raises FileNotFoundError for a bare name of neither, naming the nearest and all packaged ones.
    """
    file = Path(path)
    bare = bool(file.name) and str(path) == file.name and file.suffix.lower() != ".json"
    if not bare:
        return file
    folder = Path(str(resources.files("speciarl.judge"))) / "taxonomies"
    known = sorted(entry.stem for entry in folder.glob("*.json"))
    if file.name in known:
        return folder / f"{file.name}.json"
    if file.exists():
        return file
    near = get_close_matches(file.name, known, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise FileNotFoundError(
        f"no taxonomy file {file}, and no packaged taxonomy of that name{hint}; "
        f"packaged: {', '.join(known) or 'none'}"
    )
