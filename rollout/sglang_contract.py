"""Does an SGLang have all that this project uses, and what of it is new? Told from its source."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from speciarl.rollout.sglang_needs import ARGUMENTS, NEEDS, Need
from speciarl.rollout.sglang_source import (
    REQUIRED,
    Definition,
    Package,
    SourceError,
    parameters,
)

REFERENCE = "sglang_reference.json"


@dataclass(frozen=True)
class Lack:
    """Something that a version does not have."""

    what: str
    """"Engine.async_generate(image_data)"."""
    file: str
    """Where it was looked for, relative to the package."""
    why: str
    """What it is used for."""
    remark: str = ""

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.what} in {self.file}{remark}: {self.why}"


@dataclass
class Found:
    """What a version has in place of one name of the table."""

    file: str
    parts: dict[str, str] = field(default_factory=dict)
    """Parameters or fields in their order, each with its default as source text."""


@dataclass(frozen=True)
class Report:
    """What is known of one version."""

    version: str
    failures: tuple[Lack, ...]
    """Needed and missing: the version cannot be used."""
    lacking: tuple[Lack, ...]
    """Optional and missing."""
    changes: tuple[str, ...]
    """In what is used, since the reference; one sentence each."""
    reference: str
    found: Mapping[str, Found]
    """By name, as recorded for a reference."""

    @property
    def conforms(self) -> bool:
        return not self.failures

    def text(self) -> str:
        """For people, some lines."""
        lines = [f"SGLang {self.version}: " + ("fits" if self.conforms else "does not fit")]
        for title, rows in (
            ("missing:", self.failures),
            ("lacks, and can be used without:", self.lacking),
            (f"changed from {self.reference} to {self.version} in what is used:", self.changes),
        ):
            lines += [f"  {title}", *(f"    {row}" for row in rows)] if rows else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """For JSON, without what was found."""
        return {
            "conforms": self.conforms,
            "failures": [asdict(lack) for lack in self.failures],
            "lacking": [asdict(lack) for lack in self.lacking],
            "changes": list(self.changes),
        }


def examine(package: Package) -> Report:
    """All of the table, against the package and the recorded reference."""
    failures: list[Lack] = []
    lacking: list[Lack] = []
    found: dict[str, Found] = {}
    for need in NEEDS:
        try:
            here, missing = _look(package, need)
        except SourceError as error:
            file = f"{need.module.replace('.', '/')}.py"
            here, missing = None, [Lack(_whole(need), file, need.why, str(error))]
        if here is not None:
            known = found.setdefault(f"{need.module}:{need.name}", here)
            known.parts |= here.parts
        (lacking if need.optional else failures).extend(missing)
    version, before = reference()
    changes = tuple(_changes(before, found))
    return Report(package.version, tuple(failures), tuple(lacking), changes, version, found)


@cache
def reference() -> tuple[str, dict[str, Found]]:
    """Version and findings that others are compared with."""
    text = (resources.files("speciarl.rollout") / REFERENCE).read_text(encoding="utf-8")
    record = json.loads(text)
    return record["version"], {name: Found(**row) for name, row in record["found"].items()}


def write_reference(report: Report, file: Path) -> None:
    """Records a version as the one to compare with."""
    found = {name: asdict(row) for name, row in report.found.items()}
    record = {"version": report.version, "found": found}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _look(package: Package, need: Need) -> tuple[Found | None, list[Lack]]:
    """What there is, and what is missing. Raises SourceError."""
    if need.kind == "model":
        file = package.classes(need.module).get(need.name)
        folder = need.module.replace(".", "/")
        return (Found(file), []) if file else (None, [Lack(_whole(need), folder, need.why)])
    if need.kind == "words":
        return _look_for_words(package, need)
    definition = package.find(need.module, need.name)
    if definition is None:
        owner = need.name.partition(".")[0]
        at = "" if package.find(need.module, owner) else package.where(owner)
        remark = f"{owner} is in {at}" if at else ""
        return None, [Lack(_whole(need), package.file(need.module), need.why, remark)]
    parts = _parts(package, need, definition)
    has = set(parts) | ({"**"} if any(part.startswith("**") for part in parts) else set())
    missing = [part for part in need.parts if part not in has]
    if need.kind == "arguments":  # there are hundreds
        parts = {name: parts[name] for name in need.parts if name in parts}
    lacks = [Lack(_part(need, part), definition.file, need.why) for part in missing]
    if need.kind == "value" and missing:
        now = ", ".join(map(repr, parts)) or "something else"
        lacks = [Lack(_part(need, part), definition.file, need.why, f"it is {now}")
                 for part in missing]  # fmt: skip
    return Found(definition.file, parts), lacks


def _parts(package: Package, need: Need, definition: Definition) -> dict[str, str]:
    """What a definition is made of, by what the need asks for."""
    if need.kind == "call":
        node = definition.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return parameters(node)
    elif need.kind == "value":
        value = package.value(need.module, need.name)
        return {} if value is None else {value: REQUIRED}
    elif need.kind in ("fields", "arguments"):
        fields = package.fields(definition)
        for module in package.modules(ARGUMENTS) if need.kind == "arguments" else ():
            for node in package.tree(module).body:
                fields |= package.fields(Definition(definition.file, module, node))
        return fields
    return {}


def _look_for_words(package: Package, need: Need) -> tuple[Found | None, list[Lack]]:
    """In the file of the table, else in all: text may have moved where a name would not be found.

    Raises SourceError for the file itself, when the words are nowhere else.
    """
    wanted, trouble = set(need.parts), None
    try:
        missing = wanted - package.words(need.module)
        if not missing:
            return Found(package.file(need.module)), []
    except SourceError as error:
        missing, trouble = wanted, error
    for module in package.mentions(need.parts[0], "srt"):
        try:
            if wanted <= package.words(module):
                return Found(package.file(module)), []
        except SourceError:
            continue
    if trouble is not None:
        raise trouble
    file = package.file(need.module)
    return None, [Lack(repr(word), file, need.why) for word in need.parts if word in missing]


def _whole(need: Need) -> str:
    return ", ".join(map(repr, need.parts)) if need.kind == "words" else need.name


def _part(need: Need, part: str) -> str:
    """How a missing parameter, field or value is called."""
    if need.kind == "call":
        return f"{need.name}({'**' if part == '**' else part})"
    return f"{need.name} = {part!r}" if need.kind == "value" else f"{need.name}.{part}"


def _changes(before: Mapping[str, Found], now: Mapping[str, Found]) -> Iterator[str]:
    """One sentence for each difference. What is missing altogether is told elsewhere."""
    for key, new in now.items():
        name, old = key.partition(":")[2], before.get(key)
        if old is None:
            yield f"{name}, in {new.file}, is new"
            continue
        if old.file != new.file:
            yield f"{name} is in {new.file}, not in {old.file}"
        for part in [part for part in old.parts if part not in new.parts]:
            yield f"{name} is without {part}"
        for part, default in new.parts.items():
            if part not in old.parts:
                yield f"{name} has a further {part}{f' = {default}' if default else ''}"
            elif default != old.parts[part]:
                was = old.parts[part] or "required"
                yield f"{name}: {part} is {default or 'required'}, was {was}"
        both = [part for part in new.parts if part in old.parts]
        if both != [part for part in old.parts if part in new.parts]:
            yield f"{name} has its parts in another order: {', '.join(both)}"
