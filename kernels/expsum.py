"""Log-probs of given tokens without logits: the target-anchored exp-sum, one persistent product.

With z = hidden . weight / temperature in units of log2 and s = z at the target y of a row,

    E[v] = 2 ** min(z[v] - s, 100)    S' = sum of E[v] over v != y    U = sum of E[v] (z[v] - s)

    log p(y) = -ln(1 + S')            entropy = ln(1 + S') - ln 2 x U / (1 + S')

The target's own term is 1 exactly and stays out of S', so that nothing cancels where p(y) is
nearly 1, and no maximum is needed: a sampled token lies no 100 binary orders below another one.
Banned ids and whatever lies beyond the vocabulary count for nothing.

E, kept as a bf16 table, is all that a backward pass needs. With `finish` having put -S' at the
target's column, for any upstream dL/d(log p) = c and v = -c p(y) / temperature,

    d hidden = diag(v) (E weight)          d weight = E^T (diag(v) hidden)

A vocabulary cut over processes: add up `anchors`, then `sums`, over them; the rest is the same.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from speciarl.kernels import expsum_kernels as kernels
from speciarl.kernels import faults
from speciarl.kernels.expsum_tiles import DEFAULT, TILES, Tiles
from speciarl.kernels.launch import interpreted, on_device_of

CAPABILITY = (9, 0)
LOG2_E = math.log2(math.e)
# Few, so that under the interpreter each one goes through several tiles.
_INTERPRETED_PROGRAMS = 3
_ANY_ID = 2**31 - 1


class Allowed(NamedTuple):
    """Which ids of the whole vocabulary count; made by `allowed_ids`."""

    ids: Tensor
    """int8 [total]: 1, or 0 where banned."""
    flags: Tensor
    """int8, one per 256 ids and one more: 1 where one of them is banned."""


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    """Why this route cannot run `hidden` [..., H] and `weight` [V, H], or None if it can.

    Any layout and address will do, with a copy where the tensor memory accelerator cannot read it.
    """
    if hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"it takes bf16, not {hidden.dtype} and {weight.dtype}"
    if interpreted():
        return None
    if weight.device.type != "cuda":
        return (
            f"it needs CUDA tensors, these lie on {weight.device}; with TRITON_INTERPRET=1 set "
            "before Python starts, Triton's interpreter runs it on a CPU, slowly"
        )
    capability = torch.cuda.get_device_capability(weight.device)
    if capability != CAPABILITY:
        # Older GPUs lack the tensor memory accelerator; newer ones have other matrix instructions.
        return f"it is built for compute capability 9.0, not {capability[0]}.{capability[1]}"
    return None


def allowed_ids(total: int, banned: Tensor | None, device: torch.device | str) -> Allowed | None:
    """What `sums` and `finish` take for banned ids [K] of a vocabulary of `total`; no host read."""
    if banned is None:
        return None
    width = kernels.FLAG_IDS.value
    ids = torch.ones(-(-total // width) * width + width, dtype=torch.int8, device=device)
    ids.index_fill_(0, banned.long(), 0)
    return Allowed(ids[:total], ids.view(-1, width).amin(dim=1).eq(0).to(torch.int8))


def table_like(rows: int, vocab: int, device: torch.device | str) -> Tensor:
    """An empty bf16 table [rows, vocab] that `sums` can fill: its rows start at 16 bytes."""
    stride = -(-vocab // 8) * 8
    return torch.empty(rows, stride, dtype=torch.bfloat16, device=device)[:, :vocab]


def anchors(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, *, first_id: int = 0
) -> Tensor:
    """z of each row's target, fp32 [T], and 0 where the weight's rows do not have it.

    hidden: [T, H] bf16; weight: [V, H] bf16, the ids from `first_id` on; targets: [T] integer.
    """
    rows, width = hidden.shape
    out = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows:
        with on_device_of(hidden):
            kernels.anchor_kernel[(rows,)](
                hidden,
                weight,
                targets.contiguous(),
                out,
                len(weight),
                first_id,
                LOG2_E / temperature,
                *hidden.stride(),
                *weight.stride(),
                H=width,
                BLOCK_H=min(1024, triton.next_power_of_2(width)),
                num_warps=4,
            )
    return out


def sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    anchor: Tensor,
    allowed: Allowed | None,
    temperature: float,
    *,
    with_entropy: bool,
    table: Tensor | None = None,
    first_id: int = 0,
    tiles: str = DEFAULT,
) -> Tensor:
    """S' and U over the weight's rows, fp32 [2, T]; U is zero unless `with_entropy`.

    hidden: [T, H] bf16; weight: [V, H] bf16, the ids from `first_id` on; targets: [T] integer;
    anchor: [T] fp32 from `anchors`; table: None, and then nothing of size T x V is allocated, or a
    table [T, V] from `table_like` for E, whose column at the target is left to `finish`; tiles: a
    name of `expsum_tiles.TILES`.

    Raises ValueError for a table that does not fit, tiles that are unknown or lack the shared
    memory for a table, or `allowed` for a smaller vocabulary.
    """
    shape = _tiles(tiles, store=table is not None)
    (rows, width), vocab = hidden.shape, len(weight)
    _check(rows, vocab, table, allowed, first_id)
    out = torch.zeros(2, rows, dtype=torch.float32, device=hidden.device)
    if not rows:
        return out
    columns = triton.cdiv(vocab, shape.block_n)
    partials = torch.empty(
        1 + with_entropy, columns, rows, dtype=torch.float32, device=hidden.device
    )
    count = triton.cdiv(rows, shape.block_m) * columns
    hidden, weight = _readable(hidden), _readable(weight)
    part = shape.block_n // shape.split
    with on_device_of(hidden):
        kernels.expsum_kernel[(min(count, _programs(hidden.device) * shape.per_sm),)](
            _described(hidden, shape.block_m, shape.block_k),
            _described(weight, shape.block_n, shape.block_k),
            None if table is None else _described(table, shape.block_m, part),
            anchor,
            targets.contiguous(),
            None if allowed is None else allowed.ids,
            None if allowed is None else allowed.flags,
            partials,
            rows,
            vocab,
            first_id,
            LOG2_E / temperature,
            H=width,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            BLOCK_K=shape.block_k,
            GROUP_M=shape.group_m,
            SPLIT=shape.split,
            STORE=table is not None,
            ENTROPY=with_entropy,
            BANNED=allowed is not None,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        kernels.reduce_kernel[(triton.cdiv(rows, 32), 1 + with_entropy)](
            partials, out, rows, columns, ROWS=32, DEPTH=64, num_warps=4
        )
    return out


def finish(
    sums: Tensor,
    targets: Tensor,
    allowed: Allowed | None,
    table: Tensor | None = None,
    *,
    first_id: int = 0,
    total: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, fp32 [T] in nats, from sums [2, T] over the whole vocabulary.

    The log-prob is -inf where the target is banned or, with `total` given, no id in [0, total);
    the entropy is then that of the other ids. Entropies mean nothing if `sums` was not asked for
    them. A filled table gets -S' at the targets among its ids, which start at `first_id`. Rows with
    a clamped exponent are counted as `faults.LOGPROB_CLAMPED`.
    """
    rows = sums.shape[1]
    if allowed is not None:
        total = len(allowed.ids) if total is None else min(total, len(allowed.ids))
    logp, entropy = torch.empty_like(sums).unbind()
    if rows:
        with on_device_of(sums):
            kernels.finish_kernel[(triton.cdiv(rows, 256),)](
                sums.contiguous(),
                targets.contiguous(),
                None if allowed is None else allowed.ids,
                table,
                logp,
                entropy,
                faults.counters(sums.device)[faults.LOGPROB_CLAMPED :],
                rows,
                0 if table is None else table.shape[1],
                first_id,
                _ANY_ID if total is None else total,
                0 if table is None else table.stride(0),
                BLOCK=256,
                BANNED=allowed is not None,
                STORE=table is not None,
                num_warps=4,
            )
    return logp, entropy


def entropy_table(
    table: Tensor,
    logp: Tensor,
    entropy: Tensor,
    targets: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    *,
    first_id: int = 0,
) -> None:
    """Turns a finished table, in place, into the gradient of hidden . weight.

    For c = dL/d(log p) and g = dL/d(entropy), fp32 [T], a row becomes
    (c (onehot - p) - g p (ln p + entropy)) / temperature; then d hidden = table weight and
    d weight = table^T hidden, with no other factor. logp, entropy: what `finish` returned. A row
    with log-prob -inf becomes zero.
    """
    if len(table):
        with on_device_of(table):
            kernels.entropy_kernel[(len(table),)](
                table,
                logp,
                entropy,
                targets.contiguous(),
                grad_logp.float().contiguous(),
                grad_entropy.float().contiguous(),
                table.shape[1],
                first_id,
                table.stride(0),
                1.0 / temperature,
                BLOCK=4096,
                num_warps=8,
            )


def _tiles(name: str, *, store: bool) -> Tiles:
    fitting = [known for known, tiles in TILES.items() if tiles.fits(store=store)]
    if name not in fitting:
        mode = "with a table" if store else "without a table"
        raise ValueError(f"tiles = {name!r} cannot run {mode}; known: {', '.join(fitting)}")
    return TILES[name]


def _check(
    rows: int, vocab: int, table: Tensor | None, allowed: Allowed | None, first_id: int
) -> None:
    if table is not None and not (
        table.shape == (rows, vocab) and table.dtype == torch.bfloat16 and _is_readable(table)
    ):
        raise ValueError(
            f"table {table.dtype} {list(table.shape)} with strides {list(table.stride())} must be "
            f"bf16 [{rows}, {vocab}] with rows at 16 bytes: make it with table_like"
        )
    if allowed is not None and len(allowed.ids) < first_id + vocab:
        raise ValueError(
            f"allowed has {len(allowed.ids)} ids, fewer than first_id + V = {first_id + vocab}"
        )


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _is_readable(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator takes the matrix [rows, columns] as it lies."""
    stride = matrix.stride(0)
    return (
        matrix.stride(1) == 1
        and stride >= matrix.shape[1]
        and stride * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _readable(matrix: Tensor) -> Tensor:
    if _is_readable(matrix):
        return matrix
    return table_like(len(matrix), matrix.shape[1], matrix.device).copy_(matrix)
