"""`speciarl data check`: what is wrong with the data of a configuration, before a run finds out."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from speciarl.core.command import configured
from speciarl.core.config import Config
from speciarl.core.examples import BadImage, DataTable, Example, load_examples, open_image
from speciarl.core.toyworld import ensure_toyworld
from speciarl.judge.taxonomy import Taxonomy


def check_table(name: str, table: DataTable) -> tuple[str, list[str]]:
    """A line that counts, and one line for each thing wrong with the table."""
    try:
        examples = load_examples(name, table)
    except (OSError, ValueError) as error:
        return "cannot be loaded", [str(error)]
    images, labels = _bad_images(examples), _unknown_labels(examples, table.taxonomy)
    distinct = len({example.truth for example in examples})
    looked_up = f"{len(labels)} without a taxonomy entry" if table.taxonomy else "no taxonomy"
    summary = f"{len(examples)} images, {len(images)} unusable; {distinct} labels, {looked_up}"
    return summary, images + labels


def _bad_images(examples: Sequence[Example]) -> list[str]:
    bad = []
    with click.progressbar(examples, label="opening images", file=sys.stderr) as shown:
        for example in shown:
            try:
                open_image(example.image)
            except BadImage as error:
                bad.append(f"unusable image {error}")
    return bad


def _unknown_labels(examples: Sequence[Example], path: str) -> list[str]:
    if not path:
        return []
    try:
        taxonomy = Taxonomy.load(Path(path).expanduser())
    except (OSError, ValueError) as error:
        return [f"taxonomy: {error}"]
    images = Counter(example.truth for example in examples)
    return [
        f"no entry in {path}: {label!r} ({count} images)"
        for label, count in images.items()
        if not taxonomy.known(label)
    ]


@click.command()
@configured(default="toyworld")
def main(config: Config) -> None:
    """Open every image, look up every label.

    Goes through all data tables of a configuration and lists unusable images and labels without a
    taxonomy entry; exit status 1 if there are any.

    \b
    Examples:
      speciarl data check
      speciarl data check --preset "" --config mine.toml
      speciarl data check --preset cub-qwen2.5-vl-7b-lora --set data.train.cub.path=CUB_200_2011
    """
    if config.data.toyworld:
        ensure_toyworld(Path(config.data.toyworld))
    found = False
    for use, tables in (("train", config.data.train), ("eval", config.data.eval)):
        for name, table in tables.items():
            summary, problems = check_table(name, table)
            for line in (f"data.{use}.{name}: {summary}", *(f"  {text}" for text in problems)):
                click.echo(line)
            found = found or bool(problems)
    if found:
        raise SystemExit(1)
