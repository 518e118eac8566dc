"""Judges by name. Adding one is adding a file, a line in `FACTORIES` and its name to `KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from speciarl.judge.base import Judge
from speciarl.judge.cache import CachedJudge, VerdictCache
from speciarl.judge.panel import PanelJudge
from speciarl.judge.rules import RuleJudge
from speciarl.judge.settings import SAME, JudgeConfig
from speciarl.judge.taxonomy import Taxonomy, TaxonomyJudge
from speciarl.judge.unique import UniqueJudge

Taxonomies = Sequence[str | PathLike[str]]


def _taxonomy(config: JudgeConfig, taxonomies: Taxonomies) -> Judge:
    if not taxonomies:
        raise ValueError(
            "judge kind 'taxonomy' needs a taxonomy file: name one, or a packaged one (--taxonomy; "
            "taxonomy= in a script)"
        )
    return TaxonomyJudge(Taxonomy.load(*taxonomies))


def _transformers(config: JudgeConfig, taxonomies: Taxonomies) -> Judge:
    from speciarl.judge.causal import TransformersJudge

    return TransformersJudge(
        config.model,
        variant=config.variant,
        dtype=config.dtype,
        device=config.device,
        token_budget=config.token_budget,
    )


def _openai(config: JudgeConfig, taxonomies: Taxonomies) -> Judge:
    from speciarl.judge.server import ServerJudge

    return ServerJudge(
        config.base_url,
        config.model,
        key_env=config.key_env,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
        variant=config.variant,
    )


def _sglang(config: JudgeConfig, taxonomies: Taxonomies) -> Judge:
    from speciarl.judge.sglang import SglangJudge
    from speciarl.rollout.sglang_settings import parse_arguments

    return SglangJudge(
        config.model,
        variant=config.variant,
        dtype=config.dtype,
        device=config.device,
        memory=config.memory,
        arguments=parse_arguments(config.server_args),
    )


FACTORIES: dict[str, Callable[[JudgeConfig, Taxonomies], Judge]] = {
    "taxonomy": _taxonomy,
    "transformers": _transformers,
    "openai": _openai,
    "sglang": _sglang,
}


def build_judge(
    config: JudgeConfig,
    *,
    taxonomies: Taxonomies = (),
    names: Iterable[str] = (),
    cache: Path | None = None,
) -> Judge:
    """The judge of a configuration, with everything around it.

    A panel asks its members. A member with a model asks, in this order: the rules (rules.py),
    equal pairs of the same time (unique.py), the cache (cache.py), and only then the model. The
    exact judge needs none of these. Judges that share the rollout engine's device come asleep.

    taxonomies: paths of taxonomy files, or names of packaged ones: what the exact judge grades by,
    and names that are never several names to the rules. names: further names of that kind, such
    as the labels of the data. cache: the file that `cache = "auto"` stands for; None for no cache.
    Raises whatever the back-end, its files or the cache's file raise, ImportError for a missing
    extra.
    """
    if any(member.kind == SAME for member in config.members()):
        raise ValueError(f"judge kind {SAME!r} is for [evaluation.judge] alone; name a judge")
    known = [*names, *_names_in(taxonomies)] if config.has_model else []
    file = config.cache_file(cache) if config.has_model else None
    verdicts = None if file is None else VerdictCache(file)
    members = [_member(member, taxonomies, known, verdicts) for member in config.members()]
    return PanelJudge(members, config.vote) if config.panel else members[0]


def _member(
    config: JudgeConfig, taxonomies: Taxonomies, names: Sequence[str], cache: VerdictCache | None
) -> Judge:
    judge = FACTORIES[config.kind](config, taxonomies)
    if config.kind != "taxonomy":
        stored = judge if cache is None else CachedJudge(judge, cache)
        judge = RuleJudge(UniqueJudge(stored), names)
    if not judge.concurrent:
        judge.sleep()
    return judge


def _names_in(taxonomies: Taxonomies) -> tuple[str, ...]:
    return Taxonomy.load(*taxonomies).labels if taxonomies else ()


def make_judge(
    kind: str, *, taxonomy: str | PathLike[str] | Taxonomies = (), **settings: object
) -> Judge:
    """`build_judge` for a script: the judge named `kind`, with settings of `JudgeConfig`.

    taxonomy: the path of a taxonomy file, the name of a packaged one, or a sequence of these (one
    forest). Verdicts are kept only where `cache` names a file.
    Raises ValueError for an unknown kind or setting, naming the nearest, and what `build_judge`
    raises.
    """
    known = [field.name for field in fields(JudgeConfig)]
    for name in settings:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"judge {kind!r}: no setting {name!r}; {hint}known: {', '.join(known)}"
            )
    paths = [taxonomy] if isinstance(taxonomy, (str, PathLike)) else list(taxonomy)
    return build_judge(JudgeConfig(kind, **settings), taxonomies=paths)  # type: ignore[arg-type]
