"""The exact judge: a taxonomy file decides.

    {"name": "birds", "nodes": [
        {"name": "warbler", "parent": "bird", "synonyms": ["Parulidae"]}, ...]}

A node without parent is a root; a file may hold several, and any depth. Names and synonyms are one
space: a name belongs to one node, and loading fails where two nodes claim it, because a prediction
of that name would have two grades. Where a parent and its only child share a name in common use
(genus and species "gorilla"), give it to one of them. Forms derived from names (a plural for a
singular) yield to literal names, and a derived form that fits two nodes fits neither.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from speciarl.judge.answers import ABSTENTIONS, forms, is_abstention, key_of, split_options
from speciarl.judge.base import Pair, Verdict
from speciarl.judge.packaged import resolve
from speciarl.judge.tally import Tally
from speciarl.kernels.codes import S_MINUS, S_PLUS, A, G, S, W

RULES_VERSION = 2  # part of the judge's identity: raise it when answers.py changes a verdict
LONGEST_NAME = 256  # characters; a longer answer is nobody's name and is not looked up
_FIELDS = ("name", "parent", "synonyms")


@dataclass(frozen=True)
class Node:
    """An entry of a taxonomy file; `where` says which, for errors."""

    name: str
    parent: str | None
    synonyms: tuple[str, ...]
    where: str


class Taxonomy:
    """A forest of names. Immutable, so any number of threads may ask it.

    names: the name of each node, in file order. labels: these and all synonyms. origin: the files
    it came from.
    """

    def __init__(self, nodes: Sequence[Node], *, origin: str) -> None:
        """Raises ValueError for two nodes of one name, an unknown parent, or a circle."""
        if not nodes:
            raise ValueError(f"{origin}: no nodes")
        self.origin = origin
        self._nodes = tuple(nodes)
        self.names = tuple(node.name for node in nodes)
        self.labels = tuple(name for node in nodes for name in (node.name, *node.synonyms))
        self._literal = _index(nodes)
        self._derived = _derived(nodes, self._literal)
        self._lines = _lines(nodes)

    @classmethod
    def load(cls, *paths: str | PathLike[str]) -> "Taxonomy":
        """One forest from one or more files; a bare name is that of a packaged one (`resolve`).

        A node that several files list with the same parent is one node with all its synonyms.
        Raises FileNotFoundError, or ValueError naming the file and the entry.
        """
        if not paths:
            raise ValueError("no taxonomy file given")
        nodes: dict[str, Node] = {}
        for path in paths:
            before = frozenset(nodes)
            for node in _read(resolve(path)):
                key = key_of(node.name)
                nodes[key] = _merged(nodes[key], node, key in before) if key in nodes else node
        return cls(tuple(nodes.values()), origin=", ".join(str(path) for path in paths))

    def find(self, text: str) -> int | None:
        """The node that the whole of `text` names, or None."""
        if len(text) > LONGEST_NAME:
            return None
        keys = list(forms(text))
        for index in (self._literal, self._derived):
            for key in keys:
                if (node := index.get(key)) is not None:
                    return node
        return None

    def known(self, name: str) -> bool:
        """Whether `name` is a name or synonym, up to case, number, hyphens and article."""
        return self.find(name) is not None

    def ancestors(self, node: int) -> tuple[int, ...]:
        """The nodes above, nearest first; () for a root."""
        return self._lines[node]

    def category(self, truth: int, prediction: int) -> int:
        """The rung of one node against another (SpeciaRL, section 3)."""
        if prediction == truth:
            return S
        if truth in self._lines[prediction]:
            return S_PLUS
        if prediction in self._lines[truth]:
            return S_MINUS if prediction == self._lines[truth][0] else G
        return W

    def digest(self) -> str:
        """A hash of the content, the same for any layout and order of the files."""
        content = sorted((n.name, n.parent or "", sorted(n.synonyms)) for n in self._nodes)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class TaxonomyJudge:
    """Grades by taxonomy: exact, immediate, thread-safe.

    The truth itself is S, a descendant S+, its parent S-, a further ancestor G, a refusal A, and
    all else W: another branch, an unknown name, several names, nothing. A text that is a name as a
    whole is never taken for several ("Fish and chips"). A truth that is not in the taxonomy is a
    judge fault (category None): `check` finds those before a run.
    `Verdict.source` is one of name, abstain, unknown, several, empty, unknown-truth.
    """

    concurrent = True

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.identity = f"taxonomy-v{RULES_VERSION}:{taxonomy.digest()}"
        self.counts = Tally()

    def check(self, truths: Iterable[str]) -> None:
        """Raises ValueError with the truths that have no entry, and the file they lack in."""
        distinct = list(dict.fromkeys(truths))
        unknown = [truth for truth in distinct if not self.taxonomy.known(truth)]
        if unknown:
            shown = ", ".join(repr(truth) for truth in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(
                f"{len(unknown)} of {len(distinct)} labels have no entry in the taxonomy "
                f"{self.taxonomy.origin}: {shown}{more}"
            )

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order; see the class."""
        verdicts = [self._grade(pair) for pair in pairs]
        self.counts.add("pairs", len(pairs))
        self.counts.add("by_rule", sum(v.category is not None for v in verdicts))
        self.counts.add("faults", sum(v.category is None for v in verdicts))
        return verdicts

    def tally(self) -> dict[str, float]:
        """ "pairs", "by_rule" (all but the faults) and "faults"."""
        return self.counts.snapshot()

    def _grade(self, pair: Pair) -> Verdict:
        truth = self.taxonomy.find(pair.truth)
        if truth is None:
            return Verdict(None, "unknown-truth")
        prediction = self.taxonomy.find(pair.prediction)
        if prediction is not None:
            return Verdict(self.taxonomy.category(truth, prediction), "name")
        return self._nameless(pair.prediction)

    def _nameless(self, text: str) -> Verdict:
        if not text.strip():
            return Verdict(W, "empty")
        if len(text) > LONGEST_NAME:
            return Verdict(W, "unknown")
        if is_abstention(text):
            return Verdict(A, "abstain")
        known = sum(self.taxonomy.known(part) for part in split_options(text))
        return Verdict(W, "several" if known > 1 else "unknown")

    def sleep(self) -> None:
        """Nothing to release."""

    def wake(self) -> None:
        """Always awake."""

    def close(self) -> None:
        """Nothing to release."""


def _read(path: Path) -> list[Node]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no taxonomy file {path}") from None
    except ValueError as error:  # bad UTF-8 or bad JSON
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    entries = content.get("nodes") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected {{"name": ..., "nodes": [...]}}')
    return [_node(entry, f"{path}: nodes[{i}]") for i, entry in enumerate(entries)]


def _node(entry: Any, where: str) -> Node:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object with a name, not {entry!r}")
    for field in entry:
        nearest = get_close_matches(field, _FIELDS, n=1, cutoff=0.75)
        if nearest and field != nearest[0]:
            raise ValueError(f"{where}: unknown field {field!r}: did you mean {nearest[0]!r}?")
    name, parent = entry.get("name"), entry.get("parent")
    synonyms = entry.get("synonyms", [])
    if not isinstance(name, str):
        raise ValueError(f"{where}: name must be a text, not {name!r}")
    if not (parent is None or isinstance(parent, str)):
        raise ValueError(f"{where} ({name}): parent must be a text or null, not {parent!r}")
    if not (isinstance(synonyms, list) and all(isinstance(s, str) for s in synonyms)):
        raise ValueError(f"{where} ({name}): synonyms must be a list of texts, not {synonyms!r}")
    for text in (name, *synonyms):
        if not key_of(text) or len(text) > LONGEST_NAME:
            raise ValueError(f"{where}: {text[:40]!r} is empty or over {LONGEST_NAME} characters")
        if key_of(text) in ABSTENTIONS:
            raise ValueError(f"{where}: {text!r} is how an answer abstains, it cannot be a name")
    return Node(name, parent, tuple(synonyms), where)


def _merged(old: Node, new: Node, across_files: bool) -> Node:
    if not across_files:
        raise ValueError(f"{new.where}: {new.name!r} is listed before, in {old.where}")
    if key_of(old.parent or "") != key_of(new.parent or ""):
        raise ValueError(
            f"{new.where}: {new.name!r} has parent {new.parent!r}, "
            f"but {old.parent!r} in {old.where}"
        )
    return replace(old, synonyms=tuple(dict.fromkeys((*old.synonyms, *new.synonyms))))


def _index(nodes: Sequence[Node]) -> dict[str, int]:
    """Key of every name and synonym -> node."""
    index: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for text in (node.name, *node.synonyms):
            other = index.setdefault(key_of(text), i)
            if other != i:
                raise ValueError(
                    f"{node.where}: {text!r} names {node.name!r} and also {nodes[other].name!r} "
                    f"({nodes[other].where}); a name belongs to one node"
                )
    return index


def _derived(nodes: Sequence[Node], literal: Mapping[str, int]) -> dict[str, int | None]:
    """Key of every derived form -> node, or None where it fits several."""
    index: dict[str, int | None] = {}
    for i, node in enumerate(nodes):
        for text in (node.name, *node.synonyms):
            for key in forms(text):
                if key not in literal and index.setdefault(key, i) != i:
                    index[key] = None
    return index


def _lines(nodes: Sequence[Node]) -> tuple[tuple[int, ...], ...]:
    """The ancestors of each node, nearest first."""
    by_name = {key_of(node.name): i for i, node in enumerate(nodes)}
    parents: list[int | None] = []
    for node in nodes:
        parent = None if node.parent is None else by_name.get(key_of(node.parent))
        if node.parent is not None and parent is None:
            nearest = get_close_matches(node.parent, [n.name for n in nodes], n=1)
            hint = f": did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"{node.where}: {node.name!r} has unknown parent {node.parent!r}{hint}"
            )
        parents.append(parent)
    lines = []
    for i, node in enumerate(nodes):
        line: list[int] = []
        above = parents[i]
        while above is not None:
            if above == i or above in line:
                raise ValueError(f"{node.where}: {node.name!r} is, in a circle, above itself")
            line.append(above)
            above = parents[above]
        lines.append(tuple(line))
    return tuple(lines)
