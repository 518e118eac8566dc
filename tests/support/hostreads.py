"""A guard that refuses to let the host read a tensor's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from speciarl.kernels import faults

OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount")
"""Operators whose result, or whose result's shape, is a value that the host waits for; and all
with "unique" in their names, indices that are masks, and lengths to repeat by."""
METHODS = ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Of Tensor, that raise; they also catch what never reaches an operator."""

_paused = False


class HostRead(AssertionError):
    """The host asked for a value that the device may not have computed yet."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if not _paused and _reads(name, args, kwargs):
            raise HostRead(f"aten::{name}")
        return func(*args, **kwargs)


def _reads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
    return name in OPERATORS or "unique" in name


def _refusing(name: str) -> Callable[..., Any]:
    plain = getattr(Tensor, name)

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _paused:
            raise HostRead(f"Tensor.{name}")
        return plain(self, *args, **kwargs)

    return method


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Within it a read of any tensor raises HostRead.

    CPU tensors count as a device's, so that a machine without one can prove it; checks that
    kernels make for CPU tensors only are off (`faults.deferred`).
    """
    methods = {name: _refusing(name) for name in METHODS}
    with patch.multiple(Tensor, **methods), _Operators(), faults.deferred():
        yield


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, allowed to read: its tensors are the host's also where there is a device."""

    def allowed(*args: Any, **kwargs: Any) -> Any:
        global _paused
        before, _paused = _paused, True
        try:
            return function(*args, **kwargs)
        finally:
            _paused = before

    return allowed
