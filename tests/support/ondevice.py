"""What only a CUDA device can show of the compiled loss and reward kernels.

A script: it ends with an error if the host waits for the device between codes and gradients, two
runs differ in a bit, or CUDA graphs and several streams disturb each other's sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losscases import COLUMNS, cast, draw
from speciarl.kernels import faults
from speciarl.kernels.loss import KINDS, LossSpec, policy_gradients
from speciarl.kernels.reward import RULES, RewardSpec, best_of_n

SIZES = (1, 1000, 8192, 40_000, 300_001)


def inputs(tokens: int, kind: str) -> dict[str, Any]:
    data = cast(draw(0, tokens, min(tokens, 300), in_order=False), torch.float32)
    moved = {name: value.detach().cuda() for name, value in data.items()}
    return moved | {"spec": LossSpec(kind=kind, importance_cap=1.5, entropy_coef=0.1)}


def close(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        if one is not None:
            torch.testing.assert_close(one.double(), other.double(), rtol=2e-5, atol=2e-5)


def equal(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def check_values_and_bits() -> None:
    for kind in KINDS:
        for tokens in SIZES:
            data = inputs(tokens, kind)
            first = policy_gradients(**data, ref_gradient=True, route="triton")
            for _ in range(20):
                equal(policy_gradients(**data, ref_gradient=True, route="triton"), first)
            if tokens > 100_000:  # some ratio would lie on the other side of a clip in fp32
                continue
            double = {n: v.double() if n in COLUMNS[:-1] else v for n, v in data.items()}
            close(first, policy_gradients(**double, ref_gradient=True, route="reference"))
    for rule in RULES:
        spec = RewardSpec(rule=rule, table=(0.0,) * 3 + (1.0,) * 3 if rule == "table" else None)
        for shape in ((256, 16), (3, 1), (7, 300)):
            codes = torch.randint(-1, 7, shape, dtype=torch.int8, device="cuda")
            found = best_of_n(codes, spec, normalize=True, route="triton")
            close(found, best_of_n(codes, spec, normalize=True, route="reference"))


def check_graphs_and_streams() -> None:
    """Many launches at once, eager and replayed: every one has sums of its own."""
    cases = [inputs(tokens, kind) for kind in KINDS for tokens in (1000, 40_000)]
    wanted = [policy_gradients(**case, route="triton") for case in cases]
    graphs, captured = [], []
    for case in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(policy_gradients(**case, route="triton"))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    eager: list[Any] = []
    for _ in range(50):
        eager = []
        for stream, graph, case in zip(streams, graphs, cases[::-1], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                eager.append(policy_gradients(**case, route="triton"))
    torch.cuda.synchronize()
    for found, expected in zip(captured + eager, wanted + wanted[::-1], strict=True):
        equal(found, expected)


def check_that_nothing_waits() -> None:
    data = {kind: inputs(5000, kind) for kind in KINDS}
    codes = torch.randint(-1, 9, (30, 10), dtype=torch.int8, device="cuda")
    for route in ("triton", "reference"):
        for checked in (False, True):  # the first round compiles, and makes the counters
            torch.cuda.set_sync_debug_mode("error" if checked else "default")
            for kind in KINDS:
                found = best_of_n(codes, RewardSpec(), normalize=True, route=route)
                data[kind]["advantages"] = found.advantages.reshape(-1)
                policy_gradients(**data[kind], route=route)
            counts: Tensor = faults.take("cuda")
            torch.cuda.set_sync_debug_mode("default")
            assert counts[faults.UNKNOWN_CODE] == 3 * ((codes < -1) | (codes > 6)).sum()


if __name__ == "__main__":
    check_values_and_bits()
    check_graphs_and_streams()
    check_that_nothing_waits()
