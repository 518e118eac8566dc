"""Trains a policy: `torchrun core/train.py [--preset NAME] [--set section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path

import click

from speciarl.core.command import announce, configured, run_guarded
from speciarl.core.config import Config
from speciarl.core.world import World


def train(config: Config, world: World, *, supervised: bool = False, quiet: bool = False) -> Path:
    """A whole run; returns its folder. The final model is in `model/` below it.

    Args:
        supervised: teach the training labels instead of rewarding samples.
        quiet: no progress display.
    """
    from speciarl.core.parts import build
    from speciarl.core.report import final_table
    from speciarl.core.supervised import Supervised
    from speciarl.core.trainer import Trainer

    parts = build(config, world, supervised=supervised, quiet=quiet)
    try:
        (Supervised if supervised else Trainer)(config, world, parts).run()
        folder = parts.export()
        final_table(parts.monitor, parts.out, config.train.steps)
        parts.monitor.message(f"model: {folder}")
    finally:
        parts.close()
    return parts.out


@click.command(epilog=announce("train"))
@configured(default="toyworld")
@click.option("--quiet", is_flag=True, help="No progress display.")
def main(config: Config, quiet: bool) -> None:
    """Train with the SpeciaRL reward. Without arguments: the toy world, on any machine.

    A second run with the same train.out goes on from its newest checkpoint.
    """
    run_guarded(config, lambda world: train(config, world, quiet=quiet))


if __name__ == "__main__":
    main()
