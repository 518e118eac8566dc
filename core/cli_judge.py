"""`speciarl judge`: ask a judge, look into its cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from speciarl.core.cli_agree import agree

if TYPE_CHECKING:
    from speciarl.judge.base import Verdict
    from speciarl.judge.cache_admin import Entry

cache_file = click.argument(
    "file", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE"
)


@click.group()
def judge() -> None:
    """Ask a judge, compare judges, and look after their verdicts."""


judge.add_command(agree)


@judge.command()
@click.option("--kind", default="taxonomy", show_default=True, help="As judge.kind of a run.")
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="A setting of [judge]; repeat."
)
@click.option("--taxonomy", "files", multiple=True, help="File or packaged name; repeat.")
@click.option("--truth", required=True, help="What the image shows.")
@click.option("--prediction", required=True, help="An answer, or a completion with answer tags.")
def grade(
    kind: str, sets: tuple[str, ...], files: tuple[str, ...], truth: str, prediction: str
) -> None:
    """Print the category of a prediction.

    In brackets: what decided it, and by how much. Taxonomies are what the exact judge goes by; to
    the others they are lists of names. Verdicts are kept only where --set cache=FILE says so.

    \b
    Examples:
      speciarl judge grade --taxonomy data/toyworld/taxonomy.json \\
          --truth "golden warbler" --prediction warbler
      speciarl judge grade --taxonomy birds.json --truth "house sparrow" \\
          --prediction "<answer>a bird</answer>"
      speciarl judge grade --kind transformers --set model=Qwen/Qwen3-4B-Instruct-2507 \\
          --truth samoyed --prediction "a white dog"
      speciarl judge grade --kind openai --set base_url=http://localhost:8000/v1 \\
          --set model=judge --set key_env=JUDGE_KEY --truth robin --prediction thrush
    """
    from speciarl.judge.answers import parse_answer
    from speciarl.kernels.codes import FORMAT, NAMES

    answer = parse_answer(prediction) if "<answer" in prediction else prediction
    if answer is None:
        click.echo(f"{NAMES[FORMAT]} (not exactly one pair of answer tags)")
        return
    verdict = _verdict(kind, sets, files, truth, answer)
    if verdict.category is None:
        raise click.ClickException(f"no verdict: {verdict.source}")
    margin = "" if verdict.margin is None else f", margin {verdict.margin:.2f} nats"
    click.echo(f"{NAMES[verdict.category]} ({verdict.source}{margin})")


def _verdict(
    kind: str, sets: Sequence[str], files: Sequence[str], truth: str, answer: str
) -> Verdict:
    from speciarl.core.settings import load
    from speciarl.judge.base import Pair
    from speciarl.judge.registry import build_judge
    from speciarl.judge.settings import JudgeConfig

    try:
        config = load(JudgeConfig, [{}], [f"kind={kind}", *sets])
        asked = build_judge(config, taxonomies=files)
        try:
            asked.check([truth])
            asked.wake()
            return asked.grade([Pair(truth, answer)])[0]
        finally:
            asked.close()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise click.ClickException(str(error)) from None


@judge.group()
def cache() -> None:
    """Look into a file of verdicts, and make it smaller.

    A run keeps its judge's verdicts in the file that judge.cache names, by default verdicts.sqlite
    beside the run folders. Runs may go on meanwhile.

    \b
    Examples:
      speciarl judge cache stats runs/verdicts.sqlite
      speciarl judge cache show runs/verdicts.sqlite --truth warbler
      speciarl judge cache prune runs/verdicts.sqlite --older-than 90
    """


@cache.command()
@cache_file
def stats(file: Path) -> None:
    """Verdicts by judge, and the size of FILE.

    \b
    Example:
      speciarl judge cache stats runs/verdicts.sqlite
    """
    from speciarl.judge import cache_admin
    from speciarl.kernels.codes import NAMES

    try:
        rows = cache_admin.stats(file)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    total = sum(sum(row.counts) for row in rows)
    click.echo(f"{total} verdicts of {len(rows)} judges, {cache_admin.size(file) / 1e6:.1f} MB")
    for row in rows:
        click.echo(f"\n{row.identity}")
        shares = (f"{NAMES[code]} {count}" for code, count in enumerate(row.counts))
        click.echo(f"  {sum(row.counts)} verdicts: {', '.join(shares)}")
        click.echo(f"  from {_date(row.oldest)} to {_date(row.newest)}")


@cache.command()
@cache_file
@click.option("--judge", default="", help="Only where the judge's identity contains this text.")
@click.option("--truth", default="", help="Only where the truth contains this text.")
@click.option("--prediction", default="", help="Only where the prediction contains this text.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(0),
    help="The newest so many; 0 for all.",
)  # fmt: skip
@click.option("--json", "lines", is_flag=True, help="JSON lines, with every column.")
def show(file: Path, judge: str, truth: str, prediction: str, limit: int, lines: bool) -> None:
    """Verdicts in FILE, the newest first.

    \b
    Examples:
      speciarl judge cache show runs/verdicts.sqlite --truth warbler --limit 50
      speciarl judge cache show runs/verdicts.sqlite --limit 0 --json > verdicts.jsonl
    """
    from speciarl.judge import cache_admin

    try:
        for entry in cache_admin.entries(
            file, judge=judge, truth=truth, prediction=prediction, limit=limit
        ):
            click.echo(json.dumps(vars(entry), ensure_ascii=False) if lines else _line(entry))
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@cache.command()
@cache_file
@click.option("--judge", default="", help="Only of judges whose identity contains this text.")
@click.option("--older-than", "days", type=click.FloatRange(0), help="Only made so many days ago.")
@click.option(
    "--max-mb", type=click.FloatRange(0), help="Then the oldest, until FILE is no larger."
)
def prune(file: Path, judge: str, days: float | None, max_mb: float | None) -> None:
    """Remove verdicts from FILE and give their space back.

    A removed verdict is asked for again when it is needed.

    \b
    Examples:
      speciarl judge cache prune runs/verdicts.sqlite --older-than 90
      speciarl judge cache prune runs/verdicts.sqlite --judge openai:judge-v1
      speciarl judge cache prune runs/verdicts.sqlite --max-mb 200
    """
    from speciarl.judge import cache_admin

    if not judge and days is None and max_mb is None:
        raise click.UsageError("say what to remove: --judge, --older-than, --max-mb")
    limit = None if max_mb is None else int(max_mb * 1e6)
    try:
        removed = cache_admin.prune(file, judge=judge, days=days, max_bytes=limit)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{removed} verdicts removed, {cache_admin.size(file) / 1e6:.1f} MB left")


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def _line(entry: Entry) -> str:
    """One line; quoted, so that no character of an answer can drive the terminal."""
    from speciarl.kernels.codes import NAMES

    margin = "" if entry.margin is None else f", margin {entry.margin:.2f}"
    return (
        f"{_date(entry.made)}  {NAMES[entry.category]}: {entry.prediction!r} for {entry.truth!r} "
        f"({entry.source}{margin})"
    )
