"""Which implementation of the linear log-prob runs, what it keeps, and how many rows at once.

Routes, slowest first: "reference" (any device and dtype), "rows" (CUDA from compute capability
8.0, bf16 or fp32), "expsum" (9.0, bf16). "auto" takes the fastest that can run. Kernels are
imported when they are first used, so that nothing here needs triton.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from speciarl.kernels import reference
from speciarl.kernels.anchored import ReferenceHead
from speciarl.kernels.launch import has_triton
from speciarl.kernels.problem import HeadRoute, Problem

ROUTES: tuple[str, ...] = ("auto", "reference", "rows", "expsum")
MODES: tuple[str, ...] = ("auto", "store", "recompute")

STORE_SHARE = 0.5
"""Of the GPU's free memory: a table no larger than this is kept for the backward pass."""
CHUNK_SHARE = 0.25
"""Of the GPU's free memory: what a chunk's workspace may take."""
# Rows per chunk on a GPU. 3584 and 7168 fill the waves of a product of width 3584 on 132 SMs.
_CHUNKS = {3584: (7168, 3584, 2048)}
_OTHER_CHUNKS = (8192, 4096, 2048)
# Bytes of the reference's logits. Small chunks stay in a CPU's cache.
_REFERENCE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}

CHECKED_ROWS = 300
# Largest errors that `check` lets pass. A route that works is an order of magnitude below, also
# where matrix units truncate their fp32 sums; logits rounded to bf16 are 4e-2 off.
LIMITS = {"log-prob": 1e-3, "entropy": 1e-3, "d hidden": 1e-2, "d weight": 1e-2}


@dataclass(frozen=True)
class Choice:
    """route: a name of ROUTES but "auto"; mode: "forward" (no gradient), "store" or "recompute";
    chunk: rows at once."""

    route: str
    mode: str
    chunk: int


def make(name: str, problem: Problem, weight: Tensor) -> HeadRoute:
    """The route of this name for one problem and its weight [V, H]."""
    if name == "reference":
        return ReferenceHead(problem, weight)
    if name == "rows":
        from speciarl.kernels.rowwise import RowsHead

        return RowsHead(problem, weight)
    from speciarl.kernels.expsum_head import ExpsumHead

    return ExpsumHead(problem, weight)


def unsupported(name: str, hidden: Tensor, weight: Tensor) -> str | None:
    """Why a route cannot run `hidden` [..., H] and `weight` [V, H], or None if it can."""
    if name == "reference":
        return None
    if not has_triton():
        return "it needs triton: pip install 'speciarl[triton]'"
    if name == "rows":
        from speciarl.kernels import rowwise

        return rowwise.unsupported(hidden, weight)
    from speciarl.kernels import expsum

    return expsum.unsupported(hidden, weight)


def candidates(hidden: Tensor, weight: Tensor) -> list[str]:
    """Routes that "auto" may take, best first; the last is the reference."""
    if weight.device.type != "cuda":
        return ["reference"]
    fast = [name for name in ("expsum", "rows") if unsupported(name, hidden, weight) is None]
    return [*fast, "reference"]


def choose(
    hidden: Tensor, weight: Tensor, *, route: str, mode: str, chunk: int | None, gradients: bool
) -> Choice:
    """Route, mode and rows at once for `hidden` [..., H] and `weight` [V, H].

    gradients: whether a backward pass may follow. "auto" and None are decided by what the device
    can do and by its free memory, which the host knows without waiting for the device.

    Raises ValueError for an unknown route or mode, a route that cannot run, or a chunk below 1.
    """
    for name, value, known in (("route", route, ROUTES), ("mode", mode, MODES)):
        if value not in known:
            raise ValueError(f"{name} = {value!r} is unknown; known: {', '.join(known)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk!r} must be at least 1")
    if route == "auto":
        route = candidates(hidden, weight)[0]
    else:
        reason = unsupported(route, hidden, weight)
        if reason is not None:
            raise ValueError(f"route = {route!r} cannot run here: {reason}")
    rows = math.prod(hidden.shape[:-1])
    if chunk is None:
        chunk = default_chunk(route, hidden, weight)
    elif route == "expsum":
        chunk = rows_within(chunk, weight.shape[0])
    if not gradients:
        mode = "forward"
    elif mode == "auto":
        table = rows * weight.shape[0] * _table_bytes(route, hidden, weight)
        room = STORE_SHARE * free_bytes(weight.device)
        # A table of one chunk is made in either mode.
        fits = table <= room if weight.device.type == "cuda" else rows <= chunk
        mode = "store" if fits else "recompute"
    return Choice(route, mode, chunk)


def rows_within(chunk: int, vocab: int) -> int:
    """Rows whose table and partial sums fit in `chunk` rows of a bf16 table [chunk, V].

    The exp-sum keeps two fp32 sums a row and 256 ids. Of large chunks, a multiple of 128.
    """
    rows = max(chunk * vocab * 2 // (vocab * 2 + -(-vocab // 256) * 8), 1)
    return rows if rows < 256 else rows // 128 * 128


def default_chunk(route: str, hidden: Tensor, weight: Tensor) -> int:
    """Rows at once for `hidden` [..., H] and `weight` [V, H]."""
    vocab, width = weight.shape
    row_bytes = vocab * _table_bytes(route, hidden, weight)
    if route == "reference" or weight.device.type != "cuda":
        budget = _REFERENCE_BYTES.get(weight.device.type, _REFERENCE_BYTES["cuda"])
        return max(budget // row_bytes, 16)
    if route == "rows":
        row_bytes += vocab * 4  # fp32 logits
    rows = math.prod(hidden.shape[:-1])
    return gpu_chunk(rows, width, int(CHUNK_SHARE * free_bytes(weight.device)) // row_bytes)


def gpu_chunk(rows: int, width: int, most: int) -> int:
    """Rows at once, of `rows` of width H: a tuned size of at most `most` rows where there is one.

    Sizes that leave a rest give way to even pieces, in multiples of 128 rows: a small last chunk
    would pay for a whole pass over the weight's gradient.
    """
    sizes = _CHUNKS.get(width, _OTHER_CHUNKS)
    size = next((size for size in sizes if size <= most), sizes[-1])
    if rows % size == 0:
        return size
    count = -(-rows // size)
    return min(size, -(-rows // (count * 128)) * 128)


def free_bytes(device: torch.device) -> int:
    """Memory that a GPU could still give to tensors; 0 for other devices."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def _table_bytes(route: str, hidden: Tensor, weight: Tensor) -> int:
    if route == "reference":
        return reference.compute_dtype(hidden, weight).itemsize
    return weight.dtype.itemsize


def select(wanted: str, shape: tuple[int, int], *, device: torch.device, dtype: torch.dtype) -> str:
    """A route for a matrix of this shape, [V, H], checked; to be done once, before training.

    wanted: a route, or "auto": the best that can run and passes `check`; one that fails gives way
    to the next with a warning.

    Raises ValueError if the wanted route cannot run here, RuntimeError if it is wrong.
    """
    if wanted == "reference" or (wanted == "auto" and device.type != "cuda"):
        return "reference"
    vocab, width = shape
    draw = torch.Generator(device).manual_seed(0)
    # Logits of standard deviation 4, a trained model's.
    weight = torch.randn(vocab, width, device=device, dtype=dtype, generator=draw)
    weight.mul_(4 * width**-0.5)
    rows = CHECKED_ROWS if device.type == "cuda" else 16
    hidden = torch.randn(rows, width, device=device, dtype=dtype, generator=draw)
    if wanted != "auto":
        reason = unsupported(wanted, hidden, weight)
        if reason is not None:
            raise ValueError(
                f"head route {wanted!r} cannot run here: {reason}. Set model.head_route=auto"
            )
        check(wanted, hidden, weight)
    else:
        wanted = first_right(hidden, weight)
    del hidden, weight
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was checked is as large as the model's own
    return wanted


def first_right(hidden: Tensor, weight: Tensor) -> str:
    """The best route that can run and passes `check` on these rows; warns of those that fail."""
    *fast, slow = candidates(hidden, weight)
    for name in fast:
        try:
            check(name, hidden, weight)
        except torch.OutOfMemoryError:
            raise  # the reference needs more
        except Exception as error:  # a kernel may fail in ways of its own
            if hidden.is_cuda:  # raises if that took the device with it: no other route would run
                torch.cuda.synchronize(hidden.device)
            warnings.warn(f"head route {name!r} is not used: {error}", stacklevel=2)
        else:
            return name
    return slow


def check(name: str, hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Compares a route with the reference on these rows: log-probs, entropies and gradients.

    Two ids are banned, upstream gradients are random; in both modes, with and without entropies, in
    two chunks. Returns the largest errors, absolute for log-probs and entropies (nats), relative in
    norm for gradients.

    Raises RuntimeError with all figures where one is above LIMITS; the message names the setting.
    """
    errors = dict.fromkeys(LIMITS, 0.0)
    for entropy in (False, True):
        wanted = _outcome("reference", "recompute", entropy, hidden.float(), weight.float())
        for mode in ("store", "recompute"):
            for key, value in _outcome(name, mode, entropy, hidden, weight).items():
                gap, right = value.float() - wanted[key], wanted[key]
                # With one id there is no gradient.
                scale = right.norm().clamp(min=1e-20)
                error = gap.norm() / scale if key.startswith("d ") else gap.abs().max()
                errors[key] = max(errors[key], float(error.nan_to_num(math.inf)))
    if any(errors[key] > limit for key, limit in LIMITS.items()):
        figures = ", ".join(f"{key} {error:.2g}" for key, error in errors.items())
        raise RuntimeError(
            f"head route {name!r} is wrong here ({figures}): set model.head_route=reference"
        )
    return errors


def _outcome(
    route: str, mode: str, entropy: bool, hidden: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Values and gradients by their names in LIMITS."""
    from speciarl.kernels.head import linear_logprob

    draw = torch.Generator().manual_seed(1)
    vocab, rows = len(weight), len(hidden)
    # With fewer than four ids nothing is banned: a target must be left.
    targets = torch.randint(0, max(vocab - 2, 1), (rows,), generator=draw).to(weight.device)
    banned = torch.arange(vocab - 2, vocab, device=weight.device) if vocab > 3 else None
    upstream = torch.randn(2, rows, generator=draw).to(weight.device)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        out = linear_logprob(
            hidden,
            weight,
            targets,
            temperature=0.9,
            banned=banned,
            return_entropy=entropy,
            chunk=rows // 2 + 1,
            route=route,
            mode=mode,
        )
        values = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(values, (hidden, weight), tuple(upstream[: len(values)]))
    names = list(LIMITS) if entropy else [name for name in LIMITS if name != "entropy"]
    return dict(zip(names, [x.detach() for x in (*values, *grads)], strict=True))
