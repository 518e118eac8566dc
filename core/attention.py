"""Attention over a packed row: many sequences side by side, none sees another.

Registered with transformers under a name of our own, so that the model's code stays
transformers' own. The name must not contain "flash": transformers would then take the path of
that library.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

NAME = "speciarl_packed"


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each sequence lies in the packed row.

    cu_seqlens: [S+1] int32 on the device. pad: [S * longest] int64, the row position of each
    slot of the padded square (slots past a sequence's end repeat position 0; causality keeps
    them out of sight). unpad: [T] int64, the slot of each row position.
    """

    cu_seqlens: Tensor
    pad: Tensor
    unpad: Tensor
    count: int
    longest: int


def packing(lengths: Sequence[int], device: torch.device) -> Packing:
    """Index tensors for sequences of these lengths, made on the host, moved once."""
    count, longest = len(lengths), max(lengths)
    size = torch.tensor(lengths)
    starts = F.pad(size.cumsum(0), (1, 0))
    slot = torch.arange(longest).expand(count, longest)
    inside = slot < size[:, None]
    pad = torch.where(inside, starts[:-1, None] + slot, 0).reshape(-1)
    unpad = inside.reshape(-1).nonzero().squeeze(1)
    return Packing(
        cu_seqlens=starts.to(torch.int32).to(device, non_blocking=True),
        pad=pad.to(device, non_blocking=True),
        unpad=unpad.to(device, non_blocking=True),
        count=count,
        longest=longest,
    )


def _padded(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None) -> Tensor:
    """[T, heads, D] through torch's SDPA as a right-padded causal square."""

    def square(x: Tensor) -> Tensor:
        x = x.index_select(0, at.pad).view(at.count, at.longest, *x.shape[1:])
        return x.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        square(q), square(k), square(v), is_causal=True, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, at.unpad)


def _flash(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None) -> Tensor:
    """[T, heads, D] through the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    cu, longest = at.cu_seqlens, at.longest
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None) -> Tensor:
    """[T, heads, D] through torch's own varlen kernel (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # torch 2.10 takes is_causal, 2.12 and later a window; grouped heads only with the latter.
    causal: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    )
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    elif k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if "scale" in known:
        causal["scale"] = scale
    cu, longest = at.cu_seqlens, at.longest
    out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **causal)
    return out


ROUTES = {"sdpa": _padded, "flash-attn": _flash, "varlen": _varlen}


def best_route(device: torch.device, dtype: torch.dtype) -> str:
    """flash-attn when installed, else torch's varlen kernel on CUDA, else padded SDPA."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if _importable("flash_attn"):
            return "flash-attn"
        if _importable("torch.nn.attention.varlen"):
            return "varlen"
    return "sdpa"


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Packing | None = None,
    route: str = "sdpa",
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D].

    Returns:
        ([1, T, Hq, D], None).

    Raises:
        ValueError: called without a packing, where sequences would see each other, or with a
            sliding window, which no route has.
    """
    if packed is None:
        raise ValueError("packed attention needs packed=Packing(...) among the model's arguments")
    if sliding_window is not None:
        raise ValueError(f"packed attention has no sliding window, the model's is {sliding_window}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return ROUTES[route](q, k, v, packed, scaling).unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)
