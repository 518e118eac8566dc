"""Frozen dataclasses from TOML files, dicts and `section.key=value` words, and back again.

A root dataclass holds values, sections (nested dataclasses) and named tables
(`dict[str, Dataclass]`, written `[data.train.NAME]`). A value is an int, float, str, bool, a
`tuple[T, ...]` of these, or `X | None`. TOML has no null: "none" stands for it, and in place of a
named table "none" removes the table. Every error in the input is a `SettingsError`, and one call
reports all of them.
"""

import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from speciarl.core.settings_schema import (
    Key,
    default_of,
    describe,
    differences,
    dotted,
    inline,
    is_tables,
    schema,
    slots,
    to_dict,
    to_toml,
    type_name,
    without_none,
)

__all__ = ["SettingsError", "describe", "differences", "load", "preset_path", "to_dict", "to_toml"]

T = TypeVar("T")
Tree = dict[str, Any]  # str -> Tree | _Leaf
_SCALARS = (bool, int, float, str)
_WRONG = object()
_SECRETS = ("key", "secret", "password")  # the value of a key that is called so is not repeated
_CLOSE = 0.6  # difflib's own default for "similar"


class SettingsError(ValueError):
    """Everything wrong with the given settings; `problems` holds one line for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True)
class _Leaf:
    value: object
    origin: str = ""
    text: str | None = None  # as typed after --set; a str field takes it verbatim

    def __str__(self) -> str:
        return (inline(self.value) if self.text is None else self.text) + self.origin


def load(
    cls: type[T], sources: Sequence[Path | Mapping[str, object]], sets: Sequence[str] = ()
) -> T:
    """Builds a `cls`: defaults, then each source over the one before, then `sets` in their order.

    Sources are TOML files or nested dicts and are merged key by key. A word of `sets` is
    `section.key=value`, the value in TOML or a bare word. A field of named tables keeps its
    default only where nothing at all is given for it.

    Raises SettingsError: unreadable file, unknown key (with the nearest valid one), wrong type,
    missing value, or a ValueError of a dataclass's own `__post_init__`, section named in front.
    """
    reader = _Reader(cls)
    tree: Tree = {}
    for source in sources:
        if isinstance(source, Path):
            _merge(tree, reader.read_toml(source), f" ({source})")
        else:
            _merge(tree, source, "")
    if reader.problems:
        raise SettingsError(*reader.problems)
    for word in sets:
        reader.assign(tree, word)
    settings = reader.section(cls, tree, (), MISSING)
    if reader.problems:
        raise SettingsError(*reader.problems)
    return settings


def preset_path(name: str) -> Path:
    """The file of a preset that ships with the package. Raises SettingsError if there is none."""
    folder = Path(str(resources.files("speciarl.core"))) / "presets"
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]}" if near else ""
        listing = ", ".join(known) or "none"
        raise SettingsError(f"unknown preset {name!r}{hint}; available: {listing}")
    return folder / f"{name}.toml"


class _Reader:
    """Turns a merged tree into dataclasses, collecting every problem on the way."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.problems: list[str] = []

    def read_toml(self, path: Path) -> Mapping[str, object]:
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            self.problems.append(f"cannot read {path}: {error}")
            return {}

    def assign(self, tree: Tree, word: str) -> None:
        """Puts one `section.key=value` into the tree."""
        name, equals, text = word.partition("=")
        try:
            node: Any = tomllib.loads(f"{name} = 0") if equals else None
        except tomllib.TOMLDecodeError:
            node = None
        if node is None:
            self.problems.append(f"--set {word}: expected section.key=value")
            return
        key: list[str] = []
        while isinstance(node, dict):
            key, node = [*key, *node], next(iter(node.values()))
        text = text.strip()
        value = _parse(text)
        leaf = value if isinstance(value, dict) else _Leaf(value, " (--set)", text)
        for part in reversed(key):
            leaf = {part: leaf}
        _merge(tree, typing.cast(Tree, leaf), " (--set)")

    def section(self, cls: type, tree: Tree, key: Key, base: Any) -> Any:
        """An instance of `cls`; fields that `tree` lacks come from `base` where there is one."""
        before, known = len(self.problems), schema(cls)
        values = {} if base is MISSING else {name: getattr(base, name) for name in known}
        for name, node in tree.items():
            if name not in known:
                self.unknown(node, (*key, name))
        for name, (hint, field) in known.items():
            at = (*key, name)
            default = values.get(name, default_of(field))
            if name in tree:
                if base is MISSING and field.default_factory is hint:
                    default = MISSING  # made anew: one given field may decide the others' defaults
                values[name] = self.node(hint, tree[name], at, default)
            elif default is MISSING and is_dataclass(hint):
                values[name] = self.section(typing.cast(type, hint), {}, at, MISSING)
            elif default is MISSING:
                self.problems.append(f"missing {dotted(at)}: {type_name(hint)}, has no default")
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            front = f"{dotted(key)}: " if key else ""
            texts = error.problems if isinstance(error, SettingsError) else (str(error),)
            self.problems.extend(front + text for text in texts)
            return None

    def node(self, hint: Any, node: Tree | _Leaf, key: Key, default: Any) -> Any:
        """The value of one field."""
        inner, optional = without_none(hint)
        tables = is_tables(inner)
        if isinstance(node, _Leaf):
            if (optional or tables) and _is_none(node):
                return {} if tables and not optional else None
            value = _WRONG if tables or is_dataclass(inner) else _leaf_value(inner, node, key)
            if value is _WRONG:
                self.problems.append(f"{dotted(key)} = {node}: expected {type_name(hint)}")
            return value
        if is_dataclass(inner):
            base = default if is_dataclass(default) else MISSING
            return self.section(typing.cast(type, inner), node, key, base)
        if tables:
            cls = typing.get_args(inner)[1]
            kept = {name: sub for name, sub in node.items() if not _is_none(sub)}
            return {name: self.node(cls, sub, (*key, name), None) for name, sub in kept.items()}
        self.unknown(node, key)
        return None

    def unknown(self, node: Tree | _Leaf, key: Key) -> None:
        """Reports every key below `node`, each with the valid key that is nearest to it."""
        if isinstance(node, dict) and node:
            for name, sub in node.items():
                self.unknown(sub, (*key, name))
            return
        secret = any(word in key[-1].lower() for word in _SECRETS)
        value = f" = {node}" if isinstance(node, _Leaf) and not secret else ""
        valid = [slot.key for slot in slots(self.root, like=key)]
        self.problems.append(f"unknown key {dotted(key)}{value}: {_suggestion(key, valid)}")


def _suggestion(key: Key, valid: Sequence[Key]) -> str:
    """The valid key nearest to an unknown one, and what its own section has to offer."""
    best = max(valid, key=lambda other: _likeness(key, other))
    section = [other for other in valid if other[:-1] == key[:-1]]
    if section:
        here = max(section, key=lambda other: _likeness(key, other))
        if _word_likeness(key[-1], best[-1]) < _CLOSE:
            names = ", ".join(other[-1] for other in section)
            return f"the nearest valid key is {dotted(here)}, of {names}"
        if here != best and _word_likeness(key[-1], here[-1]) >= _CLOSE:
            return f"the nearest valid key is {dotted(best)}; in the same section: {dotted(here)}"
    return f"the nearest valid key is {dotted(best)}"


def _leaf_value(hint: Any, leaf: _Leaf, key: Key) -> object:
    if hint is str and leaf.text is not None and not isinstance(leaf.value, str):
        return leaf.text
    return _value(hint, leaf.value, key)


def _value(hint: Any, value: object, key: Key) -> object:
    """`value` as `hint`, or `_WRONG`."""
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        if not isinstance(value, list | tuple):
            return _WRONG
        items = tuple(_value(typing.get_args(hint)[0], item, key) for item in value)
        return _WRONG if any(item is _WRONG for item in items) else items
    if hint not in _SCALARS:
        raise TypeError(f"{dotted(key)}: settings cannot hold the type {hint}")
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else _WRONG


def _parse(text: str) -> object:
    """A TOML value, or the text itself where it is none (a bare word)."""
    spelt = {"True": "true", "False": "false"}.get(text, text)
    spelt = f"0{spelt}" if spelt.startswith(".") else spelt  # .5 is no TOML
    try:
        table = tomllib.loads(f"value = {spelt}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _merge(tree: Tree, given: Mapping[str, object], origin: str) -> None:
    for name, value in given.items():
        if isinstance(value, Mapping):
            below = tree.get(name)
            tree[name] = below if isinstance(below, dict) else {}
            _merge(tree[name], value, origin)
        else:
            tree[name] = value if isinstance(value, _Leaf) else _Leaf(value, origin)


def _is_none(node: Tree | _Leaf) -> bool:
    return isinstance(node, _Leaf) and (node.value is None or str(node.value).lower() == "none")


def _likeness(one: Key, other: Key) -> float:
    """Of two keys, 0 to 2: the last word counts as much as the whole."""
    whole = difflib.SequenceMatcher(None, dotted(one), dotted(other)).ratio()
    return whole + _word_likeness(one[-1], other[-1])


def _word_likeness(one: str, other: str) -> float:
    """Of two words, 0 to 1; initials count, such as lr for learning_rate."""
    initials = "".join(part[:1] for part in one.split("_"))
    return 0.9 if initials == other else difflib.SequenceMatcher(None, one, other).ratio()
