"""Whether a call takes a Triton kernel, and what kernels of several programs count with."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

ROUTES: tuple[str, ...] = ("auto", "reference", "triton")

_TICKETS = 256


@cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets kernels, on tensors of any device, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(route: str, device: torch.device) -> bool:
    """Whether `route` means the Triton kernel for tensors on `device`; "auto": on CUDA.

    Raises ValueError for an unknown route, or where "triton" is asked for and cannot run.
    """
    if route not in ROUTES:
        raise ValueError(f"route = {route!r} is unknown; known: {', '.join(ROUTES)}")
    if route == "auto":
        return device.type == "cuda" and has_triton()
    if route == "reference":
        return False
    if not has_triton():
        raise ValueError("route = 'triton' needs triton: pip install 'speciarl[triton]'")
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"route = 'triton' needs CUDA tensors, these lie on {device}; with TRITON_INTERPRET=1 "
            "set before Python starts, Triton's interpreter runs it on a CPU, slowly"
        )
    return True


_free: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """int32, zero at first, for a kernel whose programs count themselves there, and then reset it.

    Launches that may overlap get different ones: every stream has its own, and so has every
    launch that a CUDA graph captures, since graphs are replayed on any stream.
    """
    cuda = device.type == "cuda"
    capturing = cuda and torch.cuda.is_current_stream_capturing()
    key = (device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    if key in _of_stream and not capturing:
        return _of_stream[key]
    if not _free.get(device):
        if capturing:  # zeroed again by each replay
            return torch.zeros(1, dtype=torch.int32, device=device)
        # A cache line each: they stay aligned, and programs of two launches do not meet.
        _free[device] = list(torch.zeros(_TICKETS, 32, dtype=torch.int32, device=device))
        if cuda:
            torch.cuda.current_stream(device).synchronize()  # other streams see the zeros too
    fresh = _free[device].pop()
    if not capturing:
        _of_stream[key] = fresh
    return fresh


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device; within this it is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
