"""What the kernel benches share: calls timed in turn, CUDA graphs, launches, the environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], object]


def interleaved(
    calls: Mapping[str, Call],
    device: str,
    *,
    repeats: int = 20,
    at_least: float = 0.5,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every call by name, the calls in turn, after one of each.

    At least `repeats` rounds and `at_least` seconds in all, so that the median outlives what else
    the machine does; no new round after `budget` seconds. On CUDA between two events on the device,
    elsewhere by the clock.
    """
    once = _seconds_on_device if device.startswith("cuda") else _seconds_by_clock
    start = time.perf_counter()
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rounds, elapsed = 0, 0.0
    while calls and elapsed <= budget and (rounds < repeats or elapsed < at_least):
        for name, call in calls.items():
            taken[name].append(once(call))
        rounds, elapsed = rounds + 1, time.perf_counter() - start
    return taken


def _seconds_by_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_device(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replayed(
    calls: Mapping[str, Call], *, times: int = 20, repeats: int = 20
) -> dict[str, list[float]]:
    """Device seconds of a call by name, without the host: `times` calls in one CUDA graph.

    The graphs are replayed in turn, and a replay's time is divided by `times`.
    """
    graphs = {name: _graph_of(call, times) for name, call in calls.items()}
    replays: dict[str, Call] = {name: graph.replay for name, graph in graphs.items()}
    taken = interleaved(replays, "cuda", repeats=repeats)
    return {name: [seconds / times for seconds in values] for name, values in taken.items()}


def _graph_of(call: Call, times: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls; they are warmed up on a side stream, as captures want it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


def launches(call: Call) -> int:
    """Kernels, copies and fills that one call puts on the CUDA device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in record.events())


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the 10 % and 90 % quantiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "low": tenths[0], "high": tenths[-1]}


def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs: triton on CUDA, a C++ compiler on a CPU."""
    if device.startswith("cuda"):
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, to be kept with every figure."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("triton", "liger-kernel", "trl")
        if importlib.util.find_spec(name.replace("-", "_"))
    }
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "platform": platform.machine(),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        about |= {"cuda": torch.version.cuda, "gpu_memory_free": free, "gpu_memory": total}
    return about
