"""The source of an installed or unpacked SGLang, read and never imported: no torch is needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

NAME = "sglang"
REQUIRED = ""  # in place of a default

Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceError(Exception):
    """A file of the package is missing or cannot be parsed; the message names it."""


@dataclass(frozen=True)
class Definition:
    """Where a name gets its meaning."""

    file: str
    """Relative to the package: "srt/utils/common.py"."""
    module: str
    """Dotted, without the package: "srt.utils.common"."""
    node: ast.stmt


class Package:
    """The folder of a package and what its files say."""

    def __init__(self, folder: Path) -> None:
        """folder: the package itself, or one that holds it (site-packages, an unpacked wheel).

        Raises FileNotFoundError when there is none.
        """
        inside = folder / NAME
        self.root = inside if inside.is_dir() else folder
        if not (self.root.name == NAME and self.root.is_dir()):
            raise FileNotFoundError(f"{folder} holds no package {NAME}")
        self._parsed: dict[str, ast.Module] = {}

    @property
    def version(self) -> str:
        """What the package, or the dist-info folder beside it, says; "unknown" otherwise."""
        for module in ("_version", "version"):
            try:
                value = self.value(module, "__version__")
            except SourceError:
                continue
            if value:
                return value
        names = (path.name for path in self.root.parent.glob(f"{NAME}-*.dist-info"))
        return next((name.split("-")[1].removesuffix(".dist") for name in names), "unknown")

    def file(self, module: str) -> str:
        """The file of a dotted module, relative to the package. Raises SourceError."""
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if (self.root / name).is_file():
                return name
        raise SourceError(f"there is no file {stem}.py")

    def tree(self, module: str) -> ast.Module:
        """Raises SourceError."""
        if module not in self._parsed:
            name = self.file(module)
            try:
                self._parsed[module] = ast.parse((self.root / name).read_text(encoding="utf-8"))
            except SyntaxError as error:
                raise SourceError(f"{name}, line {error.lineno}: {error.msg}") from None
        return self._parsed[module]

    def find(self, module: str, name: str) -> Definition | None:
        """What `from sglang.<module> import <name>` gives, by way of imports; None if nothing.

        A dotted name is a class and its member: a method, an attribute of the class or of `self`,
        its own or a base's. Raises SourceError for the module itself.
        """
        self.tree(module)
        owner, _, member = name.partition(".")
        found = self._top(module, owner, frozenset())
        if not member or found is None:
            return found
        return self._member(found, member) if isinstance(found.node, ast.ClassDef) else None

    def fields(self, found: Definition) -> dict[str, str]:
        """Annotated fields of a class and its bases, and their defaults as source text."""
        if not isinstance(found.node, ast.ClassDef):
            return {}
        fields: dict[str, str] = {}
        for base in self._bases(found):
            fields |= self.fields(base)
        for item in found.node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                fields[item.target.id] = ast.unparse(item.value) if item.value else REQUIRED
        return fields

    def value(self, module: str, name: str) -> str | None:
        """The text or number that a name of a module stands for. Raises SourceError."""
        found = self.find(module, name)
        node = getattr(found.node, "value", None) if found else None
        return str(node.value) if isinstance(node, ast.Constant) else None

    def words(self, module: str) -> set[str]:
        """Whole string constants and identifiers of a module. Raises SourceError."""
        found: set[str] = set()
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Name):
                found.add(node.id)
        return found

    def modules(self, under: str) -> Iterator[str]:
        """Dotted names of a folder's files, its subfolders' too."""
        for path in sorted((self.root / under.replace(".", "/")).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__")

    def classes(self, under: str) -> dict[str, str]:
        """File by name of all top-level classes in a folder, its subfolders' too."""
        return self._top_names(under, r"^class (\w+)")

    def where(self, name: str) -> str:
        """The first file with a top-level class or function of this name; "" if there is none."""
        pattern = rf"^(?:class|def|async def) ({re.escape(name)})\b"
        return self._top_names("srt", pattern).get(name, "")

    def mentions(self, word: str, under: str) -> Iterator[str]:
        """Modules of a folder whose text holds `word`."""
        for module in self.modules(under):
            if word in (self.root / self.file(module)).read_text(encoding="utf-8"):
                yield module

    def _top_names(self, under: str, pattern: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in sorted((self.root / under.replace(".", "/")).rglob("*.py")):
            for name in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE):
                found.setdefault(name, path.relative_to(self.root).as_posix())
        return found

    def _top(self, module: str, name: str, seen: frozenset[str]) -> Definition | None:
        """A name of a module's top level. `seen`: modules on the way, for circles of imports."""
        try:
            tree, file = self.tree(module), self.file(module)
        except SourceError:
            return None
        stars: list[str] = []
        for node in _statements(tree.body):
            declared = isinstance(node, ast.AnnAssign) and node.value is None
            if name in _defined(node) and not declared:
                return Definition(file, module, node)
            if isinstance(node, ast.ImportFrom) and (source := _source(node, module, file)):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and source not in seen:
                        return self._top(source, alias.name, seen | {module})
                stars += [source] if node.names[0].name == "*" else []
        for source in (star for star in stars if star not in seen):
            if found := self._top(source, name, seen | {module}):
                return found
        return None

    def _member(self, owner: Definition, name: str) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        for node in owner.node.body:
            if name in _defined(node):
                return Definition(owner.file, owner.module, node)
        for inner in ast.walk(owner.node):
            if isinstance(inner, ast.Assign | ast.AnnAssign) and name in _of_self(inner):
                return Definition(owner.file, owner.module, inner)
        inherited = (self._member(base, name) for base in self._bases(owner))
        return next((found for found in inherited if found), None)

    def _bases(self, found: Definition) -> Iterator[Definition]:
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            if isinstance(base, ast.Name) and base.id != found.node.name:
                definition = self._top(found.module, base.id, frozenset())
                if definition and isinstance(definition.node, ast.ClassDef):
                    yield definition


def installed() -> Package:
    """The package that an import would find. Raises ImportError when there is none."""
    spec = find_spec(NAME)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("SGLang is not installed: pip install 'speciarl[sglang]'")
    return Package(Path(next(iter(spec.submodule_search_locations))))


def parameters(function: Function) -> dict[str, str]:
    """Names in their order and defaults as source text; "*" and "**" lead the catch-alls.

    Without a method's `self` or `cls`.
    """
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    pairs = list(zip([arg.arg for arg in plain], defaults, strict=True))
    if args.vararg:
        pairs.append((f"*{args.vararg.arg}", None))
    named = [arg.arg for arg in args.kwonlyargs]
    pairs += list(zip(named, args.kw_defaults, strict=True))
    if args.kwarg:
        pairs.append((f"**{args.kwarg.arg}", None))
    found = {name: ast.unparse(value) if value else REQUIRED for name, value in pairs}
    return {name: value for name, value in found.items() if name not in ("self", "cls")}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run on import, inside `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
            yield from _statements(node.orelse)


def _defined(node: ast.stmt) -> set[str]:
    """Names that a statement gives a meaning to, imports apart."""
    if isinstance(node, ast.ClassDef | Function):
        return {node.name}
    return {target.id for target in _targets(node) if isinstance(target, ast.Name)}


def _of_self(node: ast.stmt) -> set[str]:
    attributes = (target for target in _targets(node) if isinstance(target, ast.Attribute))
    return {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "self"}


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.AnnAssign):
        return [node.target]
    whole = node.targets if isinstance(node, ast.Assign) else []
    return [part for target in whole for part in getattr(target, "elts", [target])]


def _source(node: ast.ImportFrom, module: str, file: str) -> str:
    """The module of this package that an import names; "" for other packages."""
    if not node.level:
        top, _, rest = (node.module or "").partition(".")
        return rest if top == NAME else ""
    parts = module.split(".") if file.endswith("__init__.py") else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *filter(None, [node.module])])
