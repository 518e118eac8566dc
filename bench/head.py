"""Linear log-prob against materialised logits: peak memory, time and error, forward and backward.

    OMP_NUM_THREADS=2 python bench/head.py [--sizes small] [--device cpu] [--json FILE]

Both get the same random hidden states, matrix and upstream gradients and return log-probs and the
gradients of hidden states and matrix. Memory is what a call adds to its inputs at its peak, the
two gradients included: on a CPU the growth of the resident set of a fresh process, which makes one
call after a warm-up on a small shape; on a GPU the allocator's count. Times alternate in one
process, and the ratio is taken run by run. Errors are against float64 on the first rows.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from speciarl.kernels.head import linear_logprob

# T, V, H: the toy policy, one layer of a small model, and the heads of Qwen2.5-VL 3B and 7B.
SIZES = {
    "toy": [(1024, 400, 128)],
    "small": [(1024, 400, 128), (4096, 32768, 512)],
    "qwen": [(4096, 151936, 2048), (4096, 152064, 3584)],
}
CHECKED_ROWS = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Inputs of one measurement; `frozen` leaves out the matrix's gradient, as under LoRA."""

    rows: int
    vocab: int
    width: int
    frozen: bool
    device: str
    dtype: str

    def inputs(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden [T, H], matrix [V, H], targets [T], upstream gradients [T]; random, seeded."""
        rng = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": rng, "device": self.device}
        matrix = torch.randn(self.vocab, self.width, **options).mul_(self.width**-0.5)
        hidden = torch.randn(self.rows, self.width, **options)[:rows]
        targets = torch.randint(self.vocab, (self.rows,), **options)[:rows]
        upstream = torch.randn(self.rows, **options)[:rows]
        stored = DTYPES[self.dtype]  # float64 too starts from the values that the others see
        return (
            hidden.to(stored).to(dtype).requires_grad_(),
            matrix.to(stored).to(dtype).requires_grad_(not self.frozen),
            targets,
            upstream,
        )


def materialised(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    """The usual route: all logits, in fp32 or wider, then log_softmax."""
    logits = hidden @ matrix.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


def chunked(hidden: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, matrix, targets, route="reference")


ROUTES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "materialised": materialised,
    "reference": chunked,
}


def forward_backward(route: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Log-probs, d hidden and, unless frozen, d matrix."""
    hidden, matrix, targets, upstream = inputs
    logp = ROUTES[route](hidden, matrix, targets)
    wanted = [tensor for tensor in (hidden, matrix) if tensor.requires_grad]
    grads = torch.autograd.grad(logp, wanted, upstream.to(logp.dtype))
    return [logp.detach(), *grads]


def high_water(reset: bool = False) -> int:
    """Largest resident set of this process so far, in bytes; `reset` starts anew from now."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    # Not getrusage: a child's ru_maxrss begins at the size of the process that made it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def peak_bytes(route: str, case: Case) -> int:
    """Bytes that one call adds at its peak; meant for a process of its own on a CPU."""
    inputs = case.inputs(case.rows, DTYPES[case.dtype])
    small = Case(64, 128, case.width, case.frozen, case.device, case.dtype)
    forward_backward(route, small.inputs(small.rows, DTYPES[case.dtype]))
    if case.device == "cpu":
        before = high_water(reset=True)
        forward_backward(route, inputs)
        return high_water() - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    forward_backward(route, inputs)
    return torch.cuda.max_memory_allocated() - held


def peak_in_fresh_process(route: str, case: Case) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_bytes, route, case).result()


def seconds(case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call by route, the routes in turn, after one call of each.

    Short calls are repeated for a second, so that the median outlives what else the machine does.
    """
    inputs = case.inputs(case.rows, DTYPES[case.dtype])
    taken: dict[str, list[float]] = {route: [] for route in ROUTES}
    for route in ROUTES:
        forward_backward(route, inputs)
    while min(map(len, taken.values())) < repeats or sum(map(sum, taken.values())) < 1.0:
        for route in ROUTES:
            settle(case)
            start = time.perf_counter()
            forward_backward(route, inputs)
            settle(case)
            taken[route].append(time.perf_counter() - start)
    return taken


def settle(case: Case) -> None:
    if case.device != "cpu":
        torch.cuda.synchronize()


def errors(case: Case) -> dict[str, dict[str, float]]:
    """Against float64: largest |d logp| in nats, and relative Frobenius errors of the gradients."""
    rows = min(case.rows, CHECKED_ROWS)
    exact = forward_backward("materialised", case.inputs(rows, torch.float64))
    found = {}
    for route in ROUTES:
        logp, *grads = forward_backward(route, case.inputs(rows, DTYPES[case.dtype]))
        found[route] = {"logp": (logp.double() - exact[0]).abs().max().item()}
        for name, grad, wanted in zip(("d_hidden", "d_matrix"), grads, exact[1:], strict=False):
            found[route][name] = ((grad.double() - wanted).norm() / wanted.norm()).item()
    return found


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """All figures of one case; ratios are reference over materialised."""
    probe = peak_in_fresh_process if case.device == "cpu" else peak_bytes
    peaks = {route: probe(route, case) for route in ROUTES}
    taken = seconds(case, repeats)
    pairs = zip(taken["reference"], taken["materialised"], strict=True)
    return {
        "case": asdict(case),
        "peak_bytes": peaks,
        "peak_ratio": peaks["reference"] / peaks["materialised"],
        "seconds": {route: statistics.median(values) for route, values in taken.items()},
        "seconds_ratio": statistics.median(one / other for one, other in pairs),
        "error": errors(case),
    }


def show(result: dict[str, Any]) -> None:
    case = Case(**result["case"])
    head = f"T={case.rows} V={case.vocab} H={case.width} {case.dtype}"
    click.echo(f"\n{head}{', frozen matrix' if case.frozen else ''}")
    click.echo(
        f"{'':14}{'peak MB':>10}{'seconds':>10}{'|d logp|':>10}{'d hidden':>10}{'d matrix':>10}"
    )
    for route in ROUTES:
        error = result["error"][route]
        click.echo(
            f"{route:14}{result['peak_bytes'][route] / 1e6:10.1f}{result['seconds'][route]:10.4f}"
            + "".join(f"{error[name]:10.1e}" for name in error)
        )
    click.echo(f"{'ratio':14}{result['peak_ratio']:10.3f}{result['seconds_ratio']:10.3f}")


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


def environment(device: str) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.machine(),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
    }


@click.command(help=__doc__)
@click.option("--sizes", default=None, help="toy, small, qwen, or TxVxH[,TxVxH...].")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=None, help="Of the inputs.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    sizes: str | None, device: str, dtype: str | None, repeats: int, json_path: Path | None
) -> None:
    on_cpu = device == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    about = environment(device)
    click.echo(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for rows, vocab, width in parse_sizes(sizes or ("small" if on_cpu else "qwen")):
        for frozen in (False, True):
            results.append(measure(Case(rows, vocab, width, frozen, device, dtype), repeats))
            show(results[-1])
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"environment": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
