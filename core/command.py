"""What the commands share: options that make a configuration, and errors a person can read."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from speciarl.core.config import Config, load_config
from speciarl.core.settings import SettingsError, describe, to_toml
from speciarl.core.world import World, init_world, leave_world

EXAMPLES = {
    "train": """\b
Examples:
  torchrun core/train.py
  torchrun core/train.py --set train.steps=20 --set train.out=runs/short
  torchrun --nproc-per-node 8 core/train.py --preset cub-qwen2.5-vl-7b-lora
  torchrun core/train.py --preset cub-qwen2.5-vl-3b --print-config > mine.toml
  torchrun core/train.py --config mine.toml""",
    "evaluate": """\b
Examples:
  torchrun core/evaluate.py --model runs/toyworld/model
  torchrun core/evaluate.py --set evaluation.k=10 --out runs/best-of-10
  torchrun core/evaluate.py --set data.variant=be-specific""",
    "sft": """\b
Examples:
  torchrun core/sft.py --preset toyworld-sft
  torchrun core/sft.py --preset toybase --set train.out=runs/toybase""",
}


def announce(command: str) -> str:
    """The examples shown under a command's help."""
    return EXAMPLES[command]


def configured(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds --preset, --config, --set, --print-config and --help-config to a command."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @click.option(
            "--preset", help=f"Named settings. Default: {default}, or none where --config is given."
        )
        @click.option(
            "--config",
            "file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="TOML file over the preset.",
        )
        @click.option(
            "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Over both; repeat."
        )
        @click.option("--print-config", is_flag=True, help="Print the settings as TOML and stop.")
        @click.option("--help-config", is_flag=True, help="Explain every setting and stop.")
        @functools.wraps(command)
        def run(
            preset: str | None,
            file: Path | None,
            sets: tuple[str, ...],
            print_config: bool,
            help_config: bool,
            **rest: Any,
        ) -> None:
            if help_config:
                click.echo(describe(Config))
                return
            try:
                base = ("" if file else default) if preset is None else preset
                config = load_config(base, file, sets)
            except SettingsError as error:
                if os.environ.get("RANK", "0") != "0":
                    sys.exit(1)  # every rank finds the same; one says it
                raise click.ClickException(str(error)) from None
            if print_config:
                click.echo(to_toml(config, comments=True), nl=False)
                return
            command(config=config, **rest)

        return run

    return decorate


def run_guarded(config: Config, work: Callable[[World], object]) -> None:
    """Runs `work` in the process group; expected failures end in one readable message.

    With several ranks the exit does not wait for the others: they may hang in a collective that
    this rank will never join, and torchrun ends them when it sees the exit code.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    world = None
    try:
        world = init_world(config.train.threads, config.train.device)
        work(world)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("SPECIARL_TRACEBACK"):
            raise
        rank = "" if world is None or world.size == 1 else f" (rank {world.rank})"
        click.echo(
            f"error{rank}: {error}\n(SPECIARL_TRACEBACK=1 shows where it was raised)", err=True
        )
        sys.stderr.flush()
        if world is not None and world.size > 1:
            os._exit(1)
        sys.exit(1)
    leave_world()
