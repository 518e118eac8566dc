"""Supervised stage: `torchrun core/sft.py [--preset NAME] [--set section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import click

from speciarl.core.command import announce, configured, run_guarded
from speciarl.core.config import Config
from speciarl.core.world import World


def sft(config: Config, world: World, *, quiet: bool = False) -> Path:
    """A whole supervised run; returns its folder. The final model is in `model/` below it."""
    from speciarl.core.parts import build
    from speciarl.core.report import final_table
    from speciarl.core.supervised import Supervised
    from speciarl.core.trainer import seed_everything

    seed_everything(config.train.seed)
    parts = build(config, world, supervised=True, quiet=quiet)
    try:
        Supervised(config, world, parts).run()
        folder = parts.export()
        final_table(parts.monitor, parts.out, config.train.steps)
        parts.monitor.message(f"model: {folder}")
    finally:
        parts.close()
    return parts.out


@click.command(epilog=announce("sft"))
@configured(default="toyworld-sft")
@click.option("--quiet", is_flag=True, help="No progress display.")
def main(config: Config, quiet: bool) -> None:
    """Fine-tune on (image, label) pairs: the paper's SFT baseline, and the toy base policy."""
    run_guarded(config, lambda world: sft(config, world, quiet=quiet))


if __name__ == "__main__":
    main()
