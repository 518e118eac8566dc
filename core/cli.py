"""The console command `speciarl`: this folder's scripts as subcommands, and small tools."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from speciarl.core.cli_judge import judge
from speciarl.core.cli_rollout import rollout

# Loaded when called: they import torch and transformers, and `speciarl --help` is to be immediate.
SCRIPTS = {
    "train": ("speciarl.core.train:main", "Train a policy with the SpeciaRL reward."),
    "evaluate": ("speciarl.core.evaluate:main", "Evaluate a checkpoint or model, per data set."),
    "sft": ("speciarl.core.sft:main", "Supervised training on (image, answer)."),
}
DATA_SCRIPTS = {
    "check": ("speciarl.core.datacheck:main", "Open every image, look up every label."),
}


class LazyGroup(click.Group):
    """A group with commands that are imported on their first use.

    lazy: name -> ("module:attribute", one line of help).
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, text) in self.lazy.items()]
        rows += [(name, self.commands[name].get_short_help_str()) for name in sorted(self.commands)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    lazy=SCRIPTS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Several GPUs: torchrun --nproc-per-node 8 --no-python speciarl train",
)
@click.version_option(package_name="speciarl")
def main() -> None:
    """Specificity-aware reinforcement learning for vision-language models.

    \b
    Examples:
      speciarl train                                      the toy world, on any machine
      speciarl train --preset cub-qwen2.5-vl-7b-lora --set data.train.cub.path=CUB_200_2011
      speciarl train --preset toyworld --print-config     every setting, nothing run
      speciarl data check --set data.train.cub.path=DIR look at the images before training
    """


@main.group(cls=LazyGroup, lazy=DATA_SCRIPTS)
def data() -> None:
    """Make and check data."""


@data.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def toyworld(out: Path) -> None:
    """Draw the toy world.

    Images in the layout of CUB-200-2011, captions and a taxonomy; about 10 s. A folder that holds
    the same world is left as it is.

    \b
    Example:
      speciarl data toyworld --out data/toyworld
    """
    from speciarl.core.toyworld import ensure_toyworld

    try:
        click.echo(ensure_toyworld(out))
    except OSError as error:
        raise click.ClickException(str(error)) from None


@data.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
def toymodel(out: Path, seed: int) -> None:
    """Write an untrained toy model.

    A tiny Qwen2.5-VL with tokenizer and image processor, in the Hugging Face layout.

    \b
    Example:
      speciarl data toymodel --out runs/toyinit
    """
    from speciarl.core.toymodel import save_toymodel

    click.echo(save_toymodel(out, seed))


main.add_command(judge)
main.add_command(rollout)


if __name__ == "__main__":
    main()
