"""What a settings dataclass accepts (keys, types, defaults, docs), and how TOML spells it."""

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple

Key = tuple[str, ...]


class Slot(NamedTuple):
    """One settable key of a root dataclass. `default` is `MISSING` where a value is required."""

    key: Key
    type: Any
    default: Any
    doc: str


def slots(cls: type, key: Key = (), base: Any = MISSING, like: Key = ()) -> Iterator[Slot]:
    """All settable keys of `cls`, in the order of the source.

    `base` is an instance to take the defaults from. A named table is called what `like`, a key
    through the same table, calls it, else NAME.
    """
    docs = field_docs(cls)
    for name, (hint, field) in schema(cls).items():
        at = (*key, name)
        inner = without_none(hint)[0]
        default = default_of(field) if base is MISSING else getattr(base, name)
        if is_dataclass(inner):
            nested = default if is_dataclass(default) else MISSING
            yield from slots(typing.cast(type, inner), at, nested, like)
        elif is_tables(inner):
            named = len(like) > len(at) and like[: len(at)] == at
            table = (*at, like[len(at)] if named else "NAME")
            yield from slots(typing.get_args(inner)[1], table, MISSING, like)
        else:
            yield Slot(at, hint, default, docs.get(name, ""))


def describe(cls: type) -> str:
    """Every key of `cls` with its type and default, its doc indented below."""
    lines = []
    for slot in slots(cls):
        default = "(required)" if slot.default is MISSING else f"= {inline(slot.default)}"
        lines.append(f"{dotted(slot.key)} {default}    {type_name(slot.type)}")
        lines += textwrap.wrap(slot.doc, width=98, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested dicts of TOML and JSON values, tuples as lists. `load(cls, [to_dict(s)])` equals s."""
    return {name: _plain(getattr(settings, name)) for name in schema(settings.__class__)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """ "section.key: old -> new" for every value that differs between two `to_dict`s."""
    out = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += differences(old, new, f"{at}{name}.")
        elif old != new:
            out.append(f"{at}{name}: {old!r} -> {new!r}")
    return out


def to_toml(settings: Any, *, comments: bool = False) -> str:
    """The settings as a TOML file that `load` reads back to an equal object.

    `comments` puts each field's doc above it. `None` is written as "none"; a str that may be None
    and holds the text "none" comes back as None.
    """
    return "\n".join(_toml_lines(settings, (), comments)).strip("\n") + "\n"


@cache
def schema(cls: Any) -> Mapping[str, tuple[Any, Field[Any]]]:
    """Type and field of everything that the constructor of `cls` takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: (hints[field.name], field) for field in fields(cls) if field.init}


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The string literal under each field in the source of `cls` and its bases, on one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # made without a file, as in an interactive session
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(source)).body[0]).body
        for field, below in zip(body, body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = " ".join(doc.split())
    return docs


def default_of(field: Field[Any]) -> Any:
    """The default of a field, made anew where it has a factory, or `MISSING`."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type without `None`, and whether `None` was allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        if len(members) == 1:
            return members[0], True
    return hint, False


def is_tables(hint: Any) -> bool:
    """Whether the type is `dict[str, Dataclass]`, that is named tables."""
    return typing.get_origin(hint) is dict


def type_name(hint: Any) -> str:
    """What a user may write for a field of this type, in words."""
    inner, optional = without_none(hint)
    if is_dataclass(inner):
        name = "a section of keys"
    elif is_tables(inner):
        name = "named tables"
    elif typing.get_origin(inner) is tuple:
        name = f"list of {type_name(typing.get_args(inner)[0])}"
    else:
        name = "true or false" if inner is bool else inner.__name__
    return f'{name} or "none"' if optional else name


def dotted(key: Key) -> str:
    """A key as TOML spells it; parts that are not bare words are quoted."""
    return ".".join(
        part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else _quoted(part) for part in key
    )


def inline(value: object) -> str:
    """A value as TOML spells it on one line; `None` is "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{dotted((k,))} = {inline(v)}" for k, v in value.items()) + "}"
    return str(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _toml_lines(settings: Any, key: Key, comments: bool) -> Iterator[str]:
    docs = field_docs(settings.__class__) if comments else {}
    sections: list[tuple[Key, str, Any]] = []
    for name in schema(settings.__class__):
        value, doc = getattr(settings, name), docs.get(name, "")
        if is_dataclass(value):
            sections.append(((*key, name), doc, value))
        elif isinstance(value, dict) and value:
            sections += [((*key, name, table), doc, item) for table, item in value.items()]
        else:
            yield from _wrapped(doc, "# ")
            yield f"{name} = {inline(value)}"
    for at, doc, section in sections:
        yield from ("", *_wrapped(doc, "# "), f"[{dotted(at)}]")
        yield from _toml_lines(section, at, comments)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, width=98, initial_indent=indent, subsequent_indent=indent)


def _quoted(text: str) -> str:
    def escaped(match: re.Match[str]) -> str:
        char = match[0]
        return {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}.get(char, f"\\u{ord(char):04x}")

    return '"' + re.sub(r'[\x00-\x1f\x7f"\\]', escaped, text) + '"'
