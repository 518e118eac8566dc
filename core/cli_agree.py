"""`speciarl judge agree`: two judges, or a judge and people, on the same pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np

    from speciarl.judge.agreement import LabelledPair

PEOPLE = "labels"


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--judge", "judges", multiple=True, required=True, metavar="WORDS",
    help="key=value words of [judge], as in \"kind=transformers model=DIR\"; once or twice.",
)  # fmt: skip
@click.option("--taxonomy", "files", multiple=True, help="File or packaged name; repeat.")
@click.option("--rule", default="speciarl-ordered", show_default=True, help="Reward to compare by.")
@click.option(
    "--show", default=10, show_default=True, type=click.IntRange(0),
    help="So many pairs that they differ on.",
)  # fmt: skip
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write all.")
def agree(
    file: Path, judges: tuple[str, ...], files: tuple[str, ...], rule: str, show: int,
    out: Path | None,
) -> None:  # fmt: skip
    """Compare a judge with the labels of FILE, or two judges with each other.

    FILE is a CSV file with the columns truth and prediction; category (a name of the ladder) is
    needed where one judge is compared, group says which pairs are one image's (by default all of
    one truth). Prints the 6x6 confusion, agreement by category, Cohen's weighted kappa, and in how
    many groups the rewards change.

    \b
    Examples:
      speciarl judge agree pairs.csv --judge "kind=transformers model=Qwen/Qwen3-4B-Instruct-2507"
      speciarl judge agree pairs.csv --taxonomy birds.json --judge kind=taxonomy \\
          --judge "kind=openai base_url=http://localhost:8000/v1 model=judge"
    """
    from speciarl.judge.agreement import compare, labels_of, load_pairs, report
    from speciarl.kernels.reward import RewardSpec

    if len(judges) > 2:
        raise click.UsageError(
            f"{len(judges)} judges; one is compared with labels, two with each other"
        )
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"--json {out}: there is no folder {out.parent}")
    try:
        spec = RewardSpec(rule)
        pairs = load_pairs(file)
        if len(judges) == 1:
            unlabelled = sum(pair.category is None for pair in pairs)
            if unlabelled == len(pairs):
                raise ValueError(f"{file} has no labels (column category): name two judges")
        asked = [_asked(words, files, pairs) for words in judges]
        first, second = asked if len(asked) == 2 else (labels_of(pairs), asked[0])
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise click.ClickException(str(error)) from None
    names = [PEOPLE, *judges] if len(judges) == 1 else list(judges)
    found = compare(first, second, [pair.group for pair in pairs], spec)
    click.echo(report(found, *names))
    _differences(pairs, (first, second), names, show)
    if out is not None:
        figures = {
            "file": file.name, "rule": rule, "judges": names, "pairs": found.pairs,
            "unscored": found.unscored, "confusion": found.confusion.tolist(),
            "same": _known(found.same), "kappa_quadratic": _known(found.kappa()),
            "kappa_linear": _known(found.kappa(1)),
            "by_category": {k: [_known(x) for x in v] for k, v in found.by_category.items()},
            "groups": found.groups, "changed_groups": found.changed_groups,
            "changed_rewards": _known(found.changed_rewards),
        }  # fmt: skip
        out.write_text(json.dumps(figures, indent=1))


def _known(figure: float) -> float | None:
    """None, which JSON has a word for, instead of nan."""
    return None if math.isnan(figure) else figure


def _asked(words: str, files: tuple[str, ...], pairs: list[LabelledPair]) -> np.ndarray:
    from speciarl.core.settings import load
    from speciarl.judge.agreement import verdicts_of
    from speciarl.judge.registry import build_judge
    from speciarl.judge.settings import JudgeConfig

    for word in words.split():
        if "=" not in word:
            raise ValueError(f"--judge: {word!r} is no key=value word, such as kind=openai")
    truths = list(dict.fromkeys(one.pair.truth for one in pairs))
    judge = build_judge(load(JudgeConfig, [{}], words.split()), taxonomies=files, names=truths)
    try:
        judge.check([])  # a truth that it cannot judge is a pair not judged, no error
        judge.wake()
        return verdicts_of(judge, pairs)
    finally:
        judge.close()


def _differences(
    pairs: list[LabelledPair], columns: tuple[np.ndarray, np.ndarray], names: list[str], show: int
) -> None:
    from speciarl.kernels.codes import ABSENT, NAMES

    first, second = (column.astype(int) for column in columns)
    both = (first != ABSENT) & (second != ABSENT)
    apart = [i for i in range(len(pairs)) if both[i] and first[i] != second[i]]
    if not apart or not show:
        return
    click.echo(f"\n{len(apart)} of these differ; the furthest apart:")
    apart.sort(key=lambda i: -abs(first[i] - second[i]))
    for i in apart[:show]:
        pair = pairs[i].pair
        said = ", ".join(
            f"{name}: {NAMES[int(column[i])]}" for name, column in zip(names, columns, strict=True)
        )
        click.echo(f"  {pair.prediction!r} for {pair.truth!r} ({said})")
