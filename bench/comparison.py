"""Small kernels side by side: time on the device, launches, error; a table and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from speciarl.bench.timing import Call, interleaved, launches, replayed, spread

Errors = Callable[[Any], dict[str, float]]


def chosen(calls: dict[str, Call], names: list[str] | None) -> dict[str, Call]:
    """The named ones of the calls that this machine can make, in that order; None: all of them."""
    unknown = [name for name in names or () if name not in calls]
    if unknown:
        raise click.BadParameter(f"--providers {unknown}: here are {', '.join(calls)}")
    return {name: calls[name] for name in names or calls}


def checked_device(context: click.Context, option: click.Parameter, device: str) -> str:
    """A click callback: the device must be there."""
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise click.BadParameter(f"{device!r} is not here; there is cpu")
    return device


def measure(
    calls: Mapping[str, Call], errors: Errors, device: str, repeats: int
) -> dict[str, dict[str, Any]]:
    """The figures of every call by name; all are timed in turn in one loop.

    errors: from what a call returns, {} where there is nothing to compare. On CUDA `device_us` is
    a call's time within a replayed graph, `call_us` that of a call from Python, and `launches` what
    it puts on the device; elsewhere there is only `call_us`. A peer that cannot do the case has the
    entry "failed" alone.
    """
    results: dict[str, dict[str, Any]] = {}
    able: dict[str, Call] = {}
    cuda = device.startswith("cuda")
    for name, call in calls.items():
        try:
            results[name] = {"error": errors(call())}
            if cuda:
                results[name]["launches"] = launches(call)
                replayed({name: call}, times=1, repeats=1)  # whether a graph can hold it
            able[name] = call
        except Exception as error:  # whatever a peer's code raises
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    timed = {"call_us": interleaved(able, device, repeats=repeats)}
    if cuda:
        timed["device_us"] = replayed(able, repeats=repeats)
    for column, taken in timed.items():
        for name, seconds in taken.items():
            results[name][column] = spread([1e6 * value for value in seconds])
    return results


def show(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints one case: medians with their 10 and 90 % quantiles, and times of the first's."""
    names = next((list(r["error"]) for r in results.values() if "error" in r), [])
    time = "device_us" if any("device_us" in r for r in results.values()) else "call_us"
    unit = "device us" if time == "device_us" else "call us"
    click.echo(f"\n{title}")
    columns = f"{unit:>11}{'10-90 %':>19}{'x first':>9}{'call us':>11}{'launches':>10}"
    click.echo(f"{'':20}{columns}" + "".join(f"{name:>12}" for name in names))
    first: float | None = None
    for name, result in results.items():
        if "failed" in result:
            click.echo(f"{name:20}failed: {result['failed'][:80]}")
            continue
        taken = result[time]
        first = first or taken["median"]
        click.echo(
            f"{name:20}{taken['median']:11.1f}{taken['low']:10.1f}-{taken['high']:8.1f}"
            f"{taken['median'] / first:9.2f}{result['call_us']['median']:11.1f}"
            f"{result.get('launches', '-'):>10}"
            + "".join(f"{result['error'].get(column, math.nan):12.1e}" for column in names)
        )


def write(path: Path, environment: dict[str, Any], results: dict[str, Any]) -> None:
    """The file of a bench."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "results": results}, indent=1))
