"""What a run reads: examples, prompts, and the judge that must know every label."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speciarl.core.config import Config
from speciarl.core.examples import DataTable, Example, load_union
from speciarl.core.modelcheck import check_model
from speciarl.core.prompts import PromptBuilder
from speciarl.core.stream import PromptStore
from speciarl.core.toyworld import ensure_toyworld
from speciarl.core.world import World
from speciarl.judge.base import Judge
from speciarl.judge.registry import build_judge
from speciarl.judge.settings import JudgeConfig


@dataclass
class Data:
    """Prompts and examples: training set and evaluation sets by name."""

    builder: PromptBuilder
    store: PromptStore
    train: list[Example]
    eval: dict[str, list[Example]]


def open_data(config: Config, world: World, *, train: bool = True) -> Data:
    """Reads every table (generating the toy world where it is wanted and missing).

    Args:
        train: read the training tables; evaluation alone does not need them.

    Raises:
        FileNotFoundError, ValueError: naming the model's or a table's missing file, or a table's
            malformed line.
    """
    data = config.data
    if train and not data.train:
        raise ValueError("there is no [data.train.NAME] table: nothing to train on")
    check_model(config.model)
    if data.toyworld:
        world.first(lambda: ensure_toyworld(Path(data.toyworld)))
    try:
        builder = PromptBuilder(
            config.model.folder,
            variant=data.variant,
            instruction=data.instruction,
            max_prompt_tokens=data.max_prompt_tokens,
        )
    except OSError as error:  # transformers does not always say what it looked for
        raise OSError(f"model.path={config.model.path!r}: {error}") from error
    return Data(
        builder,
        PromptStore(builder, data.cached_prompts),
        load_union(data.train) if train else [],
        {name: load_union({name: table}) for name, table in data.eval.items()},
    )


def default_cache(out: Path, world: World) -> Path:
    """The file of verdicts beside a run's folder; one for each host where there are several."""
    host = f".{socket.gethostname()}" if world.size > world.local_size else ""
    return out.parent / f"verdicts{host}.sqlite"


def open_judge(
    config: JudgeConfig,
    tables: Mapping[str, DataTable],
    truths: Sequence[str],
    cache: Path | None = None,
) -> Judge:
    """The judge, checked against every label it will be asked about.

    Args:
        config: which judge; not "same".
        tables: their taxonomies are what the exact judge grades by, and names that the rules of
            the others know.
        truths: every label.
        cache: where verdicts are kept by default; None for nowhere.

    Raises:
        ValueError: no taxonomy named for the exact judge, labels that cannot be judged, a cache
            file that cannot be used.
        OSError: a server out of reach.
        ImportError: naming the extra to install.
    """
    files = sorted({table.taxonomy for table in tables.values() if table.taxonomy})
    if not files and any(member.kind == "taxonomy" for member in config.members()):
        raise ValueError(
            "judge kind 'taxonomy' needs a taxonomy: set taxonomy = FILE in a "
            f"[data] table ({', '.join(tables) or 'there is none'})"
        )
    judge = build_judge(config, taxonomies=files, names=dict.fromkeys(truths), cache=cache)
    try:
        judge.check(truths)
        if not judge.concurrent:
            judge.sleep()
    except BaseException:
        judge.close()
        raise
    return judge
