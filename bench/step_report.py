"""The tables of bench/step.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import click

from speciarl.bench.step_meter import StepRecord

Records = dict[str, list[StepRecord]]
MFU_FORMULA = (
    "MFU: 6 N T FLOPs where weights are trained, 4 N T where gradient only passes (LoRA's base), "
    "2 N T without gradient (reference),\n  over seconds x the bf16 peak; attention scores and "
    "recomputation are not counted, nor is sampling"
)
PARTS = ("step", "generate", "judge", "learn", "push", "other")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median [least, most]."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def samples_per_second(record: StepRecord) -> float:
    """Completions sampled, judged and learnt from, per second of the whole step."""
    return record.samples / record.parts["step"]


def ratios(records: Records) -> dict[str, dict[str, float]]:
    """Ours / TRL of samples per second and TRL / ours of seconds, pair by pair: median, range."""
    pairs = list(zip(records["ours"], records["TRL"], strict=True))
    out = {"samples/s": [samples_per_second(a) / samples_per_second(b) for a, b in pairs]}
    for part in ("step", "generate", "learn", "other"):
        out[f"{part} seconds"] = [b.parts[part] / max(a.parts[part], 1e-9) for a, b in pairs]
    out["processor seconds"] = [b.cpu / a.cpu for a, b in pairs]
    return {
        name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
        for name, v in out.items()
    }


def _rows(records: Records) -> list[tuple[str, Callable[[StepRecord], float], int]]:
    """Lines of the first table: name, figure of a record, digits."""

    def part(name: str) -> Callable[[StepRecord], float]:
        return lambda record: record.parts[name]

    def rate(tokens: str, name: str) -> Callable[[StepRecord], float]:
        return lambda record: getattr(record, tokens) / max(record.parts[name], 1e-9)

    rows = [(f"{name}, s", part(name), 4) for name in PARTS]
    return [
        *rows,
        ("processor time, s", lambda r: r.cpu, 4),
        ("samples/s", samples_per_second, 1),
        ("generate, tokens/s", rate("completion_tokens", "generate"), 0),
        ("learn, tokens/s", rate("learn_tokens", "learn"), 0),
        ("tokens per completion", lambda r: r.completion_tokens / r.samples, 2),
    ]


def print_report(result: dict[str, Any], records: Records) -> None:
    """Prints everything that was measured."""
    where = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    click.echo(f"model {result['model']} ({result['trained']}); {where}")
    names = list(records)
    count = len(records["ours"])
    click.echo(f"\n{f'median [min, max] of {count} steps':30}" + "".join(f"{n:>32}" for n in names))
    for title, figure, digits in _rows(records):
        cells = [spread([figure(r) for r in records[n]], digits) for n in names]
        click.echo(f"{title:30}" + "".join(f"{cell:>32}" for cell in cells))
    memory = [f"{result['memory_bytes'][n] / 2**20:.0f}" for n in names]
    click.echo(f"{'peak memory, MiB':30}" + "".join(f"{cell:>32}" for cell in memory))
    if result["mfu"]:
        click.echo("{:30}{:>32}".format("MFU, learn", f"{result['mfu']['learn']:.1%}"))
        click.echo("{:30}{:>32}".format("MFU, whole step", f"{result['mfu']['step']:.1%}"))
        click.echo(MFU_FORMULA)
    _print_inside(records, names)
    for name, value in (result["packing"] or {}).items():
        click.echo(f"largest difference in nats, {name}: {value:.2e}")
    if result["ratio"]:
        click.echo("\nTRL's seconds / ours (samples/s: ours / TRL's), median [min, max] of pairs")
        for name, value in result["ratio"].items():
            low, high = value["min"], value["max"]
            click.echo(f"{name:30}{value['median']:8.2f} [{low:.2f}, {high:.2f}]")


def _print_inside(records: Records, names: Sequence[str]) -> None:
    """Medians of what lies within the parts, and of the amounts of work."""
    for title, kind, form in (("seconds inside", "detail", ".4f"), ("work", "work", ".0f")):
        keys = sorted({key for n in names for r in records[n] for key in getattr(r, kind)})
        click.echo(f"\n{title + ' (median)':30}" + "".join(f"{n:>32}" for n in names))
        for key in keys:
            cells = [_median([getattr(r, kind).get(key) for r in records[n]], form) for n in names]
            click.echo(f"{key:30}" + "".join(f"{cell:>32}" for cell in cells))


def _median(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else "-"
