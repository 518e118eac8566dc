"""Linear log-prob: our routes, its peers and the bare matrix products, side by side.

\b
    OMP_NUM_THREADS=2 python bench/head.py --json FILE
    python bench/head.py --sizes qwen --json FILE                      (on a GPU)
    python bench/head.py --sizes 8192x152064x3584 --providers expsum,rows,liger-sum,products

All get the same random hidden states, matrix and upstream gradients. Three passes are measured:
forward alone (old and reference log-probs), with both gradients, and with a frozen matrix (LoRA).
Memory is what a call adds to its inputs at its peak, results included: on a CPU the growth of the
resident set of a fresh process, on a GPU the allocator's count. Times alternate in one process;
"of limit" is the time of the bare matrix products over a provider's, round by round. Errors are
against float64 on the first rows. Peers that are not installed are listed with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from speciarl.bench.head_measure import DTYPES, Case, measure
from speciarl.bench.head_routes import LIMIT, OURS, PEERS, available
from speciarl.bench.timing import can_compile, environment

# T, V, H: the toy policy, one layer of a small model, and the heads of Qwen2.5-VL 3B and 7B.
SIZES = {
    "toy": [(1024, 400, 128)],
    "small": [(1024, 400, 128), (4096, 32768, 512)],
    "qwen": [
        (rows, vocab, width)
        for vocab, width in ((151936, 2048), (152064, 3584))
        for rows in (1024, 4096, 8192, 32768)
    ],
}
PASSES = {"full": (False, True), "frozen": (True, True), "forward": (False, False)}
ON_CPU = ["reference", "reference-chunked", "materialised", "torch.compile"]
ON_CPU += ["linear_cross_entropy", "trl", "products"]


def defaults(device: str) -> list[str]:
    """Every provider on a GPU; those that run without one on a CPU."""
    names = ON_CPU if device == "cpu" else [*OURS, *PEERS, *LIMIT]
    return [name for name in names if name != "torch.compile" or can_compile(device)]


def show(result: dict[str, Any]) -> None:
    """A table of one case."""
    click.echo(f"\n{result['case']['title']}")
    click.echo(
        f"{'':22}{'ms':>10}{'TFLOP/s':>9}{'of limit':>9}{'peak MB':>10}{'|d logp|':>10}"
        f"{'d hidden':>10}{'d matrix':>10}"
    )
    for name, one in result["providers"].items():
        if "failed" in one:
            click.echo(f"{name:22} {one['failed'][:90]}")
            continue
        error = [one["error"].get(key) for key in ("logp", "d_hidden", "d_matrix")]
        click.echo(
            f"{name:22}{one['seconds'] * 1e3:10.3f}{one['tflops']:9.1f}"
            f"{one.get('limit_ratio', float('nan')):9.3f}{one['peak_bytes'] / 1e6:10.1f}"
            + "".join(f"{'-':>10}" if e is None else f"{e:10.1e}" for e in error)
        )


def markdown(results: list[dict[str, Any]]) -> str:
    """Milliseconds and the share of the limit, a row per provider and a column per case."""
    names = list(dict.fromkeys(name for result in results for name in result["providers"]))
    lines = [
        "| | " + " | ".join(result["case"]["title"] for result in results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for name in names:
        cells = []
        for result in results:
            one = result["providers"].get(name, {})
            ratio = f" ({one['limit_ratio']:.2f})" if "limit_ratio" in one else ""
            cells.append(f"{one['seconds'] * 1e3:.2f}{ratio}" if "seconds" in one else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_sizes(text: str) -> list[tuple[int, int, int]]:
    if text in SIZES:
        return SIZES[text]
    try:
        sizes = [tuple(int(n) for n in part.split("x")) for part in text.split(",")]
        return [(rows, vocab, width) for rows, vocab, width in sizes]
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is neither one of {', '.join(SIZES)} nor TxVxH[,TxVxH...]"
        ) from error


def parse_names(text: str, known: list[str], what: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no {what}; known: {', '.join(known)}")
    return names


@click.command(help=__doc__)
@click.option("--sizes", default=None, help="toy, small, qwen, or TxVxH[,TxVxH...].")
@click.option("--passes", default=",".join(PASSES), show_default=True, help="Which passes.")
@click.option("--providers", default=None, help="Names, comma-separated; all that run by default.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=None, help="Of the inputs.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="At least.")
@click.option("--budget", type=float, default=60.0, show_default=True, help="Seconds a case.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    sizes: str | None,
    passes: str,
    providers: str | None,
    device: str,
    dtype: str | None,
    repeats: int,
    budget: float,
    json_path: Path | None,
) -> None:
    on_cpu = device == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    known = [*OURS, *PEERS, *LIMIT]
    names = parse_names(providers, known, "provider") if providers else defaults(device)
    wanted = parse_names(passes, list(PASSES), "pass")
    about = environment(device)
    click.echo(", ".join(f"{key} {value}" for key, value in about.items()))
    found, missing = available(names)
    for name, why in missing.items():
        click.echo(f"without {name}: {why}")
    results = []
    for rows, vocab, width in parse_sizes(sizes or ("small" if on_cpu else "qwen")):
        for frozen, backward in (PASSES[name] for name in wanted):
            case = Case(rows, vocab, width, frozen, backward, device, dtype)
            results.append(measure(case, found, repeats=repeats, budget=budget))
            show(results[-1])
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": about, "missing": missing, "results": results}
        json_path.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
