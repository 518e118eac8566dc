"""Attention over a packed row: many sequences side by side, none sees a stranger.

Registered with transformers under a name of our own, so that the model's code stays
transformers' own. The name must not contain "flash": transformers would then take the path of
that library.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from speciarl.core.packing import Block, Packing, packing

NAME = "speciarl_packed"


def _padded(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None) -> Tensor:
    """[T, heads, D] through torch's SDPA, a rectangle for the prompts and one for completions."""

    def rectangle(x: Tensor, where: Tensor, block: Block) -> Tensor:
        x = x.index_select(0, where).view(block.segments, -1, *x.shape[1:])
        return x.transpose(1, 2)

    outs = []
    for block in at.blocks:
        keys, values = (rectangle(x, block.k_at, block) for x in (k, v))
        out = F.scaled_dot_product_attention(
            rectangle(q, block.q_at, block),
            keys,
            values,
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scale,
            enable_gqa=True,
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, at.unpad)


def _gathered(k: Tensor, v: Tensor, at: Packing) -> tuple[Tensor, Tensor]:
    """Keys and values of all segments. Indexing, whose gradient is summed in a fixed order."""
    return (k, v) if at.keys is None else (k[at.keys], v[at.keys])


def _flash(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None) -> Tensor:
    """[T, heads, D] through the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    k, v = _gathered(k, v, at)
    return flash_attn_varlen_func(
        q, k, v, at.cu_q, at.cu_k, at.longest_q, at.longest_k, softmax_scale=scale, causal=True
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None) -> Tensor:
    """[T, heads, D] through torch's own varlen kernel (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = _gathered(k, v, at)
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
    out: Any = varlen_attn(q, k, v, at.cu_q, at.cu_k, at.longest_q, at.longest_k, **causal)
    return out


ROUTES = {"sdpa": _padded, "flash-attn": _flash, "varlen": _varlen}


def check_route(route: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compares a route with the padded one on a small row; done once, before training.

    Raises:
        RuntimeError: they differ by more than rounding; the message names the setting.
    """
    trees = [(37, [5, 0, 64, 1]), (2, []), (70, [33, 33])]
    at = packing(trees, device)
    draw = torch.Generator().manual_seed(0)
    total = sum(prompt + sum(own) for prompt, own in trees)
    q, k, v = (
        torch.randn(total, heads, 64, generator=draw).to(device, dtype) for heads in (8, 2, 2)
    )
    found = ROUTES[route](q, k, v, at, 0.125).float()
    wanted = _padded(q.float(), k.float(), v.float(), at, 0.125)
    error = float((found - wanted).abs().max())
    if not error < (1e-4 if dtype == torch.float32 else 3e-2):
        raise RuntimeError(
            f"attention route {route!r} is wrong by {error:.3g} here: set model.attention=sdpa"
        )


def choose_route(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """`wanted`, checked; for "auto" the first that is here and right: flash-attn, torch's varlen
    kernel (both CUDA, half precision), padded SDPA.

    Raises:
        RuntimeError: the wanted route is wrong on this machine.
    """
    if wanted != "auto":
        check_route(wanted, device, dtype)
        return wanted
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for route in ("flash-attn", "varlen"):
            try:
                check_route(route, device, dtype)
            except ImportError:
                continue
            except Exception as error:  # a kernel may fail in ways of its own
                warnings.warn(f"attention route {route!r} is not used: {error}", stacklevel=2)
            else:
                return route
    return "sdpa"


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


# No mask is registered beside it: transformers then makes none, which would read the positions on
# the host.
AttentionInterface.register(NAME, packed_attention)
