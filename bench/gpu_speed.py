"""Speeds that bench/gpu.py measures besides those against peers: cuBLAS, tiles, chunk rows."""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import count
from typing import Any

import torch

from speciarl.bench.head_measure import Case
from speciarl.bench.head_routes import chunked
from speciarl.bench.timing import interleaved, spread
from speciarl.kernels.routes import rows_within

HEADS = {"3B": (151936, 2048), "7B": (152064, 3584)}
TOY_HEADS = {"toy": (500, 64)}
CHUNKS = (2048, 3584, 4096, 7168, 8192)


def heads(device: str) -> dict[str, tuple[int, int]]:
    """V and H of the heads to measure: Qwen2.5-VL's, or a toy on a CPU."""
    return TOY_HEADS if device == "cpu" else HEADS


def _case(rows: int, head: tuple[int, int], device: str, **how: bool) -> Case:
    settings = {"frozen": False, "backward": True} | how
    dtype = "float32" if device == "cpu" else "bfloat16"
    return Case(rows, *head, device=device, dtype=dtype, **settings)


def cublas(device: str, seconds: float) -> dict[str, Any]:
    """TFLOP/s of a head's three products, in the first calls and after `seconds` of them.

    logits [T, V], d hidden [T, H] and d weight [V, H], as the routes ask for them.
    """
    found = {}
    rows = 64 if device == "cpu" else 8192
    for name, head in heads(device).items():
        hidden, matrix, _, _ = (x.detach() for x in _case(rows, head, device).inputs())
        table = torch.randn(rows, head[0], device=device).to(hidden.dtype)
        calls = {
            "logits": lambda h=hidden, w=matrix: h @ w.T,
            "d_hidden": lambda t=table, w=matrix: t @ w,
            "d_weight": lambda t=table, h=hidden: t.T @ h,
        }
        flops = 2 * rows * head[0] * head[1] / 1e12
        late = burst = interleaved(calls, device, repeats=5, at_least=0.0)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            late = interleaved(calls, device, repeats=5, at_least=0.0)
        found[name] = {
            product: {
                "burst": flops / statistics.median(burst[product]),
                "sustained": flops / statistics.median(late[product]),
            }
            for product in calls
        }
    return found


def tiles(device: str, budget: float) -> dict[str, Any]:
    """Milliseconds of the exp-sum product by tile shape, forward alone and with a table.

    At the 7B head, since every shape is compiled. One that does not compile or launch says why. On
    a CPU there is nothing to time.
    """
    if device == "cpu":
        return {}
    from speciarl.kernels import expsum
    from speciarl.kernels.expsum_tiles import TILES

    found: dict[str, Any] = {}
    for name in ("7B",):
        head = HEADS[name]
        hidden, matrix, targets, _ = (x.detach() for x in _case(8192, head, device).inputs())
        anchor = expsum.anchors(hidden, matrix, targets, 1.0)
        table = expsum.table_like(8192, head[0], device)
        for store in (False, True):
            calls: dict[str, Any] = {"products": lambda h=hidden, w=matrix: h @ w.T}
            failed = {}
            for shape in (key for key, one in TILES.items() if one.fits(store=store)):
                call = _tile_call(hidden, matrix, targets, anchor, table if store else None, shape)
                try:
                    call()
                    torch.cuda.synchronize()
                    calls[shape] = call
                except Exception as error:  # the compiler's, or the driver's
                    failed[shape] = f"{type(error).__name__}: {error}"
            taken = interleaved(calls, device, repeats=10, budget=budget)
            limit = statistics.median(taken["products"])
            found[f"{name} {'store' if store else 'forward'}"] = failed | {
                shape: spread([1e3 * s for s in seconds])
                | {"of_limit": limit / statistics.median(seconds)}
                for shape, seconds in taken.items()
            }
    return found


def _tile_call(hidden: Any, matrix: Any, targets: Any, anchor: Any, table: Any, shape: str) -> Any:
    from speciarl.kernels import expsum

    def call() -> Any:
        return expsum.sums(
            hidden, matrix, targets, anchor, None, 1.0,
            with_entropy=False, table=table, tiles=shape,
        )  # fmt: skip

    return call


def asked_for(rows: int, route: str, vocab: int) -> int:
    """The chunk at which a route takes so many rows at once, a multiple of 128."""
    if route != "expsum":
        return rows
    return next(chunk for chunk in count(rows) if rows_within(chunk, vocab) == rows)


def chunk_sweep(device: str, budget: float) -> dict[str, Any]:
    """Milliseconds of the chunked policy loss by rows of a chunk, forward and backward."""
    found: dict[str, Any] = {}
    rows, sizes = (256, (64, 128)) if device == "cpu" else (28672, CHUNKS)
    routes = ("reference",) if device == "cpu" else ("expsum", "rows")
    for name, head in heads(device).items():
        inputs = _case(rows, head, device).inputs()
        for route in routes:
            asked = {size: asked_for(size, route, head[0]) for size in sizes}
            calls = {
                str(size): partial(chunked(route, chunk).run, inputs, True)
                for size, chunk in asked.items()
            }
            taken = interleaved(calls, device, repeats=3, budget=budget)
            found[f"{name} {route}"] = {
                size: spread([1e3 * s for s in seconds]) for size, seconds in taken.items()
            }
    return found
