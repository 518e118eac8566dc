"""What can be wrong with values that lie on a device, counted there and read later.

A range check on a device value would make the host wait, so kernels and reference routes count
what they find in `counters`, leave the row out, and go on; the trainer takes the counts with a
step's statistics and stops with `explain`'s message. Reading a CPU tensor costs nothing: there
`check_range` raises at once, except inside `deferred`, which makes the CPU behave as a device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

FAULTS: tuple[str, ...] = (
    "target_range",
    "target_banned",
    "logprob_clamped",
    "sequence_range",
    "unknown_code",
)
TARGET_RANGE, TARGET_BANNED, LOGPROB_CLAMPED, SEQUENCE_RANGE, UNKNOWN_CODE = range(len(FAULTS))

# A log-prob below about -69 nats is clamped: that says little of a policy's own samples, but is no
# reason to stop (a reference may find an answer that unlikely, and so may fine-tuning).
_MEANING: tuple[str | None, ...] = (
    "targets outside the vocabulary: the tokenizer and the model do not belong together",
    "targets that are banned ids: the engine samples ids that the policy masks; "
    "give both the same list",
    None,
    "sequence_ids outside [0, number of sequences): the batch was packed wrongly",
    "category codes outside -1..6 (kernels/codes.py): the judge returned something else",
)

_counters: dict[torch.device, Tensor] = {}
_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


def counters(device: torch.device | str) -> Tensor:
    """int32 [len(FAULTS)] of `device`, to which kernels add what they find.

    The first call for a device must not be inside a CUDA graph's capture.
    """
    key = _with_index(torch.device(device))
    if key not in _counters:
        with torch.inference_mode(False):
            _counters[key] = torch.zeros(len(FAULTS), dtype=torch.int32, device=key)
        if key.type == "cuda":
            torch.cuda.current_stream(key).synchronize()  # once: other streams see the zeros too
    return _counters[key]


def count(fault: int, bad: Tensor) -> None:
    """Adds the number of true entries of `bad`, a bool tensor, without a host read."""
    counters(bad.device)[fault].add_(bad.sum())


def take(device: torch.device | str) -> Tensor:
    """A copy of `counters(device)`, which start at zero again; no host read.

    To be called on the stream that ran the kernels.
    """
    current = counters(device)
    taken = current.clone()
    current.zero_()
    return taken


def explain(counts: Sequence[int]) -> str | None:
    """What counts from `take` mean that must not be learnt from, naming the arguments; None if
    there are none."""
    found = [
        f"{int(number)} {meaning}"
        for number, meaning in zip(counts, _MEANING, strict=True)
        if number and meaning
    ]
    return "; ".join(found) or None


@contextmanager
def deferred() -> Iterator[None]:
    """Within it, CPU tensors are treated as a device's: faults are counted, none is raised."""
    before = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(before)


def immediate(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be read on the host: on the CPU, outside `deferred`."""
    return tensor.device.type == "cpu" and not _deferred.get()


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raises ValueError if CPU integers are not all in [low, high); device values are not read."""
    if not immediate(values) or values.numel() == 0:
        return
    for value in values.aminmax():
        if not low <= int(value) < high:
            raise ValueError(f"{name} holds {int(value)}; it must be in [{low}, {high})")


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
