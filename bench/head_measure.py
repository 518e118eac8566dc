"""Peak memory, time and error of the providers in bench/head_routes.py for one size."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speciarl.bench.head_routes import Inputs, Provider, available, plain
from speciarl.bench.timing import interleaved

CHECKED_ROWS = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Inputs of one measurement; `frozen` leaves out the matrix's gradient, as under LoRA;
    `backward` off: log-probs alone, as of the old and the reference policy."""

    rows: int
    vocab: int
    width: int
    frozen: bool
    backward: bool
    device: str
    dtype: str

    @property
    def title(self) -> str:
        what = "forward" if not self.backward else "frozen matrix" if self.frozen else "full"
        return f"T={self.rows} V={self.vocab} H={self.width} {self.dtype}, {what}"

    @property
    def flops(self) -> int:
        """Of the products that nobody can do without (2, 4 or 6 T H V)."""
        products = 1 if not self.backward else 2 if self.frozen else 3
        return 2 * products * self.rows * self.vocab * self.width

    def inputs(self, dtype: torch.dtype | None = None, rows: int | None = None) -> Inputs:
        """Random and seeded; logits have standard deviation 1. Wider types start from the values
        that the others see. Without a backward pass nothing requires a gradient: a peer that
        computes its gradients in the forward pass would do so under `no_grad` too."""
        rng = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": rng, "device": self.device}
        matrix = torch.randn(self.vocab, self.width, **options).mul_(self.width**-0.5)
        hidden = torch.randn(self.rows, self.width, **options)[:rows]
        targets = torch.randint(self.vocab, (self.rows,), **options)[:rows]
        upstream = torch.randn(self.rows, **options)[:rows]
        stored = DTYPES[self.dtype]
        dtype = dtype or stored
        return Inputs(
            hidden.to(stored).to(dtype).requires_grad_(self.backward),
            matrix.to(stored).to(dtype).requires_grad_(self.backward and not self.frozen),
            targets,
            upstream,
        )


def providers_for(case: Case, providers: dict[str, Provider]) -> dict[str, Provider]:
    """Those that can do what the case asks."""
    return {name: p for name, p in providers.items() if case.backward or p.forward}


def high_water(reset: bool = False) -> int:
    """Largest resident set of this process so far, in bytes; `reset` starts anew from now."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    # Not getrusage: a child's ru_maxrss begins at the size of the process that made it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def peak_bytes(name: str, case: Case) -> int:
    """Bytes that one call adds at its peak, results included; on a CPU in a process of its own."""
    provider = available([name])[0][name]
    small = Case(64, 128, case.width, case.frozen, case.backward, case.device, case.dtype)
    inputs = case.inputs()
    provider.run(small.inputs(), case.backward)
    if case.device == "cpu":
        before = high_water(reset=True)
        provider.run(inputs, case.backward)
        return high_water() - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    provider.run(inputs, case.backward)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def peak_in_fresh_process(name: str, case: Case) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_bytes, name, case).result()


def errors(provider: Provider, case: Case) -> dict[str, float]:
    """Against float64: largest |d logp| in nats, and relative Frobenius errors of the gradients."""
    rows = min(case.rows, CHECKED_ROWS)
    exact, given = case.inputs(torch.float64, rows), case.inputs(rows=rows)
    upstream = torch.ones_like(exact.upstream) if provider.uniform else exact.upstream
    logp = plain(*exact[:3])
    found = provider.run(given, case.backward)
    wanted = torch.autograd.grad(logp, exact.wanted, upstream.double()) if case.backward else ()
    error = {}
    if len(found) > len(wanted):
        error["logp"] = (found.pop(0).double() - logp.detach()).abs().max().item()
    for name, one, other in zip(("d_hidden", "d_matrix"), found, wanted, strict=False):
        error[name] = ((one.double() - other).norm() / other.norm()).item()
    return error


def measure(
    case: Case, providers: dict[str, Provider], *, repeats: int, budget: float
) -> dict[str, Any]:
    """All figures of one case by provider; one that fails (out of memory, say) says why.

    `limit_ratio` is the products' time over the provider's, round by round: 1 is the limit.
    """
    results: dict[str, dict[str, Any]] = {}
    able = {}
    for name, provider in providers_for(case, providers).items():
        try:
            probe = peak_in_fresh_process if case.device == "cpu" else peak_bytes
            results[name] = {"kind": provider.kind, "peak_bytes": probe(name, case)}
            results[name]["error"] = errors(provider, case)
            able[name] = provider
        except Exception as error:  # whatever a peer's code raises at a size it cannot do
            results[name] = {"kind": provider.kind, "failed": f"{type(error).__name__}: {error}"}
        if name not in able:  # out here, where no traceback holds the failed call's tensors
            gc.collect()
            if case.device != "cpu":
                torch.cuda.empty_cache()
    inputs = case.inputs()
    calls = {name: lambda p=p: p.run(inputs, case.backward) for name, p in able.items()}
    taken = interleaved(calls, case.device, repeats=repeats, budget=budget)
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        results[name] |= {"seconds": median, "spread": [min(seconds), max(seconds)]}
        results[name]["tflops"] = case.flops / median / 1e12
        if "products" in taken:
            ratios = [one / other for one, other in zip(taken["products"], seconds, strict=True)]
            results[name]["limit_ratio"] = statistics.median(ratios)
    return {"case": vars(case) | {"title": case.title}, "providers": results}
