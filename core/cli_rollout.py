"""`speciarl rollout`: what can be asked of a rollout engine without starting one."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def rollout() -> None:
    """Look at the engines that sample completions."""


@rollout.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
@click.option(
    "--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write what was found."
)
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False),
    help="Write the (one) package as a reference to compare others with.",
)  # fmt: skip
def contract(folders: tuple[Path, ...], out: Path | None, record: Path | None) -> None:
    """Check that an SGLang has everything that is used of it.

    FOLDER is an unpacked wheel or a site-packages folder; by default the installed package is
    looked at. Its source is read, nothing is imported, so its dependencies are not needed. Prints
    what is missing, what is optional and missing, and what is different from the version that the
    engines are tested with. Exits with 1 if anything needed is missing.

    \b
    Examples:
      speciarl rollout contract
      pip download --no-deps sglang==0.5.23 && unzip -q sglang-*.whl -d unpacked
      speciarl rollout contract unpacked --json contract.json
    """
    from speciarl.rollout.sglang_contract import examine, reference, write_reference
    from speciarl.rollout.sglang_source import Package, installed

    if record is not None and len(folders) > 1:
        raise click.UsageError("--record takes one package")
    for option, file in (("--json", out), ("--record", record)):
        if file is not None and not file.parent.is_dir():
            raise click.UsageError(f"{option} {file}: there is no folder {file.parent}")
    try:
        packages = [Package(folder) for folder in folders] or [installed()]
    except (OSError, ImportError) as error:
        raise click.ClickException(str(error)) from None
    reports = [examine(package) for package in packages]
    click.echo("\n".join(report.text() for report in reports))
    if record is not None:
        write_reference(reports[0], record)
    if out is not None:
        versions = {report.version: report.as_dict() for report in reports}
        found = {"reference": reference()[0], "versions": versions}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not all(report.conforms for report in reports):
        raise SystemExit(1)
