"""Data: tables in the configuration, examples in the program.

Three layouts. `cub`: CUB-200-2011's own (`images/`, `images.txt`, `classes.txt`,
`image_class_labels.txt`, `train_test_split.txt`). `folder`: `<label>/*.jpg`, or
`train|test/<label>/*.jpg`. `jsonl`: a file of lines {"image": path relative to the file,
"label": ..., "split": ..., "domain": ...}, the last two optional.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from speciarl.core.images import BadImage, open_image

__all__ = [
    "BadImage",
    "DataTable",
    "Example",
    "clean_label",
    "load_examples",
    "load_union",
    "open_image",
]

FORMATS = ("cub", "folder", "jsonl")
SPLITS = ("train", "test", "all")
CUB_LAYOUT = (
    "the layout of CUB_200_2011: images/, images.txt, classes.txt, image_class_labels.txt, "
    "train_test_split.txt"
)
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))

_CLASS_NUMBER = re.compile(r"^\d+\.(?=[^\W\d_])")


@dataclass(frozen=True)
class DataTable:
    """One `[data.train.NAME]` or `[data.eval.NAME]` table. Raises ValueError naming the field."""

    format: str
    """Layout of the files: "cub", "folder" or "jsonl"."""
    path: str
    """The folder of the data set, or the file of `jsonl`; `~` is expanded."""
    split: str
    """Part to take: "train", "test" or "all"; the data must be split unless it is "all"."""
    k: int = 0
    """Take a random subset of this many images; 0 takes all."""
    seed: int = 42
    """Seed of the subset. A subset of a smaller k is part of that of a larger one."""
    taxonomy: str = ""
    """Taxonomy for the exact judge: a file or a packaged name; empty if another judge grades."""
    domain: str = ""
    """Name under which evaluation groups it; empty for the name of the table."""

    def __post_init__(self) -> None:
        for field, value, known in (
            ("format", self.format, FORMATS),
            ("split", self.split, SPLITS),
        ):
            if value not in known:
                nearest = get_close_matches(value, known, n=1)
                hint = f"did you mean {nearest[0]!r}? " if nearest else ""
                raise ValueError(f"{field} = {value!r}: {hint}known: {', '.join(known)}")
        if not self.path:
            raise ValueError("path = '': expected the folder or file of the data set")
        for field, number in (("k", self.k), ("seed", self.seed)):
            if number < 0:
                raise ValueError(f"{field} = {number}: must not be negative")


@dataclass(frozen=True)
class Example:
    """An image with its ground truth.

    key: "<dataset>/<path of the image in the data set>", stable over runs and machines; a `jsonl`
    image listed again (several captions) has "#2", "#3", ... appended.
    """

    key: str
    image: Path
    truth: str
    dataset: str
    domain: str


@dataclass(frozen=True)
class _Row:
    """An image as its layout lists it, before the split and the subset are taken."""

    path: str
    image: Path
    label: str
    split: str
    domain: str = ""


def load_examples(name: str, table: DataTable) -> list[Example]:
    """The examples of a table, in the order of its files, whatever the subset.

    name: the table's name, which becomes `Example.dataset`. Images are not opened here.
    The subset: image i of the split draws the i-th number of `random.Random(seed).random()`, a
    sequence that Python keeps over versions, and the k lowest are taken.
    Raises FileNotFoundError naming the missing part of the layout, ValueError for a malformed
    line (file and line number), a split that the data lacks, or k above the number of images.
    """
    if not name or "/" in name:
        raise ValueError(f"data table {name!r}: a name is not empty and has no slash")
    path = Path(table.path).expanduser()
    rows = _LAYOUTS[table.format](path, table.split != "all")
    rows = [row for row in rows if table.split in ("all", row.split)]
    if not rows:
        raise ValueError(f"data table {name!r}: no images of split {table.split!r} in {path}")
    if table.k > len(rows):
        raise ValueError(
            f"data table {name!r}: k = {table.k}, but split {table.split!r} of {path} has only "
            f"{len(rows)} images"
        )
    if table.k:
        generator = random.Random(table.seed)
        draws = [generator.random() for _ in rows]
        taken = sorted(range(len(rows)), key=draws.__getitem__)[: table.k]
        rows = [rows[i] for i in sorted(taken)]
    return [
        Example(
            f"{name}/{row.path}", row.image, row.label, name, row.domain or table.domain or name
        )
        for row in rows
    ]


def load_union(tables: Mapping[str, DataTable]) -> list[Example]:
    """The examples of all tables, table after table in the order of the mapping.

    Raises what `load_examples` raises, and ValueError for no tables or a key that appears twice.
    """
    if not tables:
        raise ValueError("no data tables")
    examples: dict[str, Example] = {}
    for name, table in tables.items():
        for example in load_examples(name, table):
            if example.key in examples:
                raise ValueError(f"data table {name!r}: two examples have the key {example.key!r}")
            examples[example.key] = example
    return list(examples.values())


def clean_label(folder: str) -> str:
    """The label in a folder's name: "001.Black_footed_Albatross" -> "Black footed Albatross".

    A leading number counts only before a dot and a letter, so "737.800" stays.
    """
    return " ".join(_CLASS_NUMBER.sub("", folder).replace("_", " ").split())


def _require(path: Path, expected: str, *, folder: bool = False) -> Path:
    if not (path.is_dir() if folder else path.is_file()):
        raise FileNotFoundError(f"no {'folder' if folder else 'file'} {path}; expected {expected}")
    return path


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def _cub_table(
    path: Path, value_name: str, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A file of lines "<id> <value>", every value among the `known` if these are given."""
    table: dict[str, str] = {}
    for where, line in _lines(_require(path, CUB_LAYOUT)):
        number, _, value = (part.strip() for part in line.partition(" "))
        if not value or (known is not None and value not in known):
            raise ValueError(f"{where}: expected '<id> <{value_name}>', not {line!r}")
        if number in table:
            raise ValueError(f"{where}: id {number} is listed before")
        table[number] = value
    return table


def _cub(root: Path, needs_split: bool) -> list[_Row]:
    _require(root, CUB_LAYOUT, folder=True)
    _require(root / "images", CUB_LAYOUT, folder=True)
    splits = {"1": "train", "0": "test"}
    paths = _cub_table(root / "images.txt", "path below images/")
    classes = _cub_table(root / "classes.txt", "class name")
    columns = {"image_class_labels.txt": ("id of a class in classes.txt", classes)}
    if needs_split:
        columns["train_test_split.txt"] = ("1 for train or 0 for test", splits)
    values = {file: _cub_table(root / file, *column) for file, column in columns.items()}
    for file, table in values.items():
        if missing := next((number for number in paths if number not in table), ""):
            raise ValueError(f"{root / file}: no line for image {missing} ({paths[missing]})")
    class_of, split_of = values["image_class_labels.txt"], values.get("train_test_split.txt", {})
    return [
        _Row(
            path,
            root / "images" / path,
            clean_label(classes[class_of[number]]),
            splits.get(split_of.get(number, ""), ""),
        )
        for number, path in paths.items()
    ]


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_split(folder: Path) -> bool:
    """Whether `folder` holds label folders, unlike a label that happens to be "train"."""
    return folder.is_dir() and any(entry.is_dir() for entry in _visible(folder))


def _folder(root: Path, needs_split: bool) -> list[_Row]:
    _require(root, "a folder of <label>/ or train|test/<label>/ with images", folder=True)
    splits = [(name, root / name) for name in ("train", "test") if _is_split(root / name)]
    if needs_split and not splits:
        raise ValueError(f"{root}: no train/ or test/ with label folders; split must be 'all'")
    return [
        _Row(image.relative_to(root).as_posix(), image, clean_label(label.name), split)
        for split, folder in splits or [("", root)]
        for label in _visible(folder)
        if label.is_dir()
        for image in _visible(label)
        if image.suffix.lower() in SUFFIXES
    ]


def _jsonl(file: Path, needs_split: bool) -> list[_Row]:
    rows = []
    seen: dict[str, int] = {}
    for where, line in _lines(_require(file, 'a file of lines {"image": ..., "label": ...}')):
        path, label, split, domain = _jsonl_fields(line, where)
        if needs_split and not split:
            raise ValueError(f"{where}: no 'split'; give every line one, or use split = 'all'")
        seen[path] = seen.get(path, 0) + 1
        key = path if seen[path] == 1 else f"{path}#{seen[path]}"
        rows.append(_Row(key, file.parent / path, label, split, domain))
    return rows


def _jsonl_fields(line: str, where: str) -> tuple[str, str, str, str]:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, not {line[:60]!r}")
    values = {field: entry.get(field, "") for field in ("image", "label", "split", "domain")}
    for field, value in values.items():
        if not isinstance(value, str) or (field in ("image", "label") and not value.strip()):
            raise ValueError(f"{where}: {field!r} must be a text, not {value!r}")
    path, label, split, domain = (value.strip() for value in values.values())
    if Path(path).is_absolute():
        raise ValueError(f"{where}: 'image' must be relative to {Path(where).parent}, not {path!r}")
    return path, label, split, domain


_LAYOUTS = {"cub": _cub, "folder": _folder, "jsonl": _jsonl}
