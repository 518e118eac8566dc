"""Supervised stage: `torchrun core/sft.py [--preset NAME] [--set section.key=value ...]`."""

from __future__ import annotations

import click

from speciarl.core.command import announce, configured, run_guarded
from speciarl.core.config import Config
from speciarl.core.train import train


@click.command(epilog=announce("sft"))
@configured(default="toyworld-sft")
@click.option("--quiet", is_flag=True, help="No progress display.")
def main(config: Config, quiet: bool) -> None:
    """Fine-tune on (image, label) pairs: the paper's SFT baseline, and the toy base policy."""
    run_guarded(config, lambda world: train(config, world, supervised=True, quiet=quiet))


if __name__ == "__main__":
    main()
