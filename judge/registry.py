"""Judges by name. Adding one is adding a file and a line in `KINDS`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike

from speciarl.judge.base import Judge
from speciarl.judge.taxonomy import Taxonomy, TaxonomyJudge


def _taxonomy(taxonomy: str | PathLike[str] | Sequence[str | PathLike[str]]) -> Judge:
    paths = [taxonomy] if isinstance(taxonomy, (str, PathLike)) else list(taxonomy)
    return TaxonomyJudge(Taxonomy.load(*paths))


KINDS: dict[str, Callable[..., Judge]] = {"taxonomy": _taxonomy}


def _require_known(kind: str) -> None:
    if kind not in KINDS:
        nearest = get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown judge {kind!r}: {hint}known judges: {', '.join(KINDS)}")


def make_judge(kind: str, **options: object) -> Judge:
    """The judge named `kind`, built with its options.

    taxonomy: `taxonomy`, the path of a taxonomy file, the name of a packaged one, or a sequence of
    these (one forest).
    Raises ValueError for an unknown kind (naming the nearest) or option, and whatever the judge
    raises about its files.
    """
    _require_known(kind)
    factory = KINDS[kind]
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters)
        raise ValueError(f"judge {kind!r}: {error}; its options: {known}") from None
    return factory(**options)


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge, and how it is run. Raises ValueError naming the field."""

    kind: str = "taxonomy"
    """"taxonomy": exact, from the taxonomy files of the data tables."""
    workers: int = 1
    """Threads that grade finished groups while others are still being generated."""

    def __post_init__(self) -> None:
        if self.kind != "same":  # evaluation's word for "as in training"
            _require_known(self.kind)
        if self.workers < 1:
            raise ValueError(f"workers = {self.workers}: must be at least 1")
