"""Everything that only a GPU can tell about the kernels, in one command budgeted for nine minutes.

\b
    make bench-gpu                          (bench/results/<gpu>-<date>.json and .md)
    python bench/gpu.py --sections head,policy_loss --minutes 4
    python bench/gpu.py --device cpu --out FOLDER      (small sizes: whether it all runs)

Sections, in order: errors against float64; bit-equality of two runs; sizes beyond int32; whether
anything between codes and gradients waits for the device; cuBLAS's rates, burst and sustained; the
exp-sum's tiles; chunk rows; policy loss and best of N; log-probs against every peer at every size.
The files are written anew after each section, so that a run cut short keeps what it has. A section
that fails is reported with its error and the next one runs; the exit status is then 1.
"""

from __future__ import annotations

import datetime
import json
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from speciarl.bench import best_of_n, gpu_checks, gpu_speed, head, policy_loss
from speciarl.bench.head_measure import Case, measure
from speciarl.bench.head_routes import available
from speciarl.bench.timing import environment

Keep = Callable[[Any], None]
"""Writes what a section has so far."""

RESULTS = Path(__file__).parent / "results"
# Of the time that is left when a section starts; the last one takes what remains.
SHARES = {"cublas": 0.03, "tiles": 0.1, "chunks": 0.1, "policy_loss": 0.06, "best_of_n": 0.04}


def against_peers(device: str, seconds: float, keep: Keep) -> list[dict[str, Any]]:
    """bench/head.py's cases, the time spread evenly; the largest come last."""
    on_cpu = device == "cpu"
    providers, _ = available(head.defaults(device))
    sizes = head.SIZES["toy" if on_cpu else "qwen"]
    dtype = "float32" if on_cpu else "bfloat16"
    cases = [
        Case(*size, frozen=frozen, backward=backward, device=device, dtype=dtype)
        for size in sorted(sizes)
        for frozen, backward in head.PASSES.values()
    ]
    end = time.perf_counter() + seconds
    results: list[dict[str, Any]] = []
    for done, case in enumerate(cases):
        left = (end - time.perf_counter()) / (len(cases) - done)
        if left < 0:
            click.echo(f"\n{case.title}: no time left")
            continue
        results.append(measure(case, providers, repeats=3, budget=max(left * 0.6, 1.0)))
        head.show(results[-1])
        keep(results)
    return results


SECTIONS: dict[str, Callable[[str, float, Keep], Any]] = {
    "accuracy": lambda device, *_: gpu_checks.accuracy(device),
    "bit_equal": lambda device, *_: gpu_checks.bit_equal(device),
    "beyond_int32": lambda device, *_: gpu_checks.beyond_int32(device),
    "no_waiting": lambda device, *_: gpu_checks.no_waiting(device),
    "cublas": lambda device, seconds, _: gpu_speed.cublas(device, seconds / 3),
    "tiles": lambda device, seconds, _: gpu_speed.tiles(device, seconds / 4),
    "chunks": lambda device, seconds, _: gpu_speed.chunk_sweep(device, seconds / 4),
    "policy_loss": lambda device, *_: policy_loss.run(device),
    "best_of_n": lambda device, *_: best_of_n.run(device),
    "head": against_peers,
}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables: one per section, log-probs with a column per case."""
    about = record["environment"]
    lines = ["# Kernels on " + str(about["device"]), ""]
    lines += [f"{key} {value}  " for key, value in about.items()]
    for name, result in record["sections"].items():
        lines += ["", f"## {name} ({record['seconds'][name]:.0f} s)", ""]
        if name == "head" and isinstance(result, list):
            for title in head.PASSES:
                wanted = head.PASSES[title]
                part = [r for r in result if (r["case"]["frozen"], r["case"]["backward"]) == wanted]
                lines += [f"### {title}: ms (of limit)", "", head.markdown(part), ""]
        else:
            lines += _rows(result)
    return "\n".join(lines) + "\n"


def _rows(result: Any, prefix: str = "") -> list[str]:
    """Nested dictionaries as one bullet a leaf group."""
    if not isinstance(result, dict):
        return [f"- {prefix}: {_short(result)}"]
    if any(isinstance(value, dict) for value in result.values()):
        rows = [_rows(value, f"{prefix} {key}".strip()) for key, value in result.items()]
        return [row for part in rows for row in part]
    return [f"- {prefix}: " + ", ".join(f"{key} {_short(v)}" for key, v in result.items())]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).split("\n")[0][:200]


def file_stem(about: dict[str, Any]) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    return f"{gpu}-{datetime.date.today().isoformat()}"


def write(record: dict[str, Any], stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    stem.with_suffix(".md").write_text(markdown(record))


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--sections", default=",".join(SECTIONS), help="Names, comma-separated.")
@click.option("--minutes", type=float, default=8.5, show_default=True, help="For all of it.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS)
def main(device: str, sections: str, minutes: float, out: Path) -> None:
    names = head.parse_names(sections, list(SECTIONS), "section")
    if device != "cpu" and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here; --device cpu runs small sizes")
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * minutes
    about = environment(device)
    record: dict[str, Any] = {"environment": about, "sections": {}, "seconds": {}}
    record["missing"] = available(head.defaults(device))[1]
    stem, failed = out / file_stem(about), []
    for name in names:
        start = time.perf_counter()
        seconds = (end - start) * SHARES.get(name, 1.0)

        def keep(result: Any, name: str = name, start: float = start) -> None:
            record["sections"][name] = result
            record["seconds"][name] = time.perf_counter() - start
            write(record, stem)

        click.echo(f"\n== {name} ({end - start:.0f} s left)")
        try:
            keep(SECTIONS[name](device, seconds, keep))
        except Exception as error:  # whatever it is, the other sections may still work
            traceback.print_exc()
            failed.append(name)
            so_far = record["sections"].get(name)
            keep({"failed": f"{type(error).__name__}: {error}", "so_far": so_far})
        if name != "head":
            click.echo("\n".join(_rows(record["sections"][name])))
    click.echo(f"\nwritten: {stem}.json and .md")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
