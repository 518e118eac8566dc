"""One decoding step of a Qwen text decoder with few operations.

The decoder layers of Qwen2.5-VL and Qwen3-VL cost about fifty small operations a token step in
transformers; here they are twenty: one projection for query, key and value, one for gate and up,
rotary embedding for all heads at once from tables, residuals added inside the products.

The joined matrices are the model's own memory: after `FusedText(...)` the parameters q_proj,
k_proj, v_proj, gate_proj and up_proj are views of them, so weights copied in place reach both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speciarl.rollout.cache import GroupCache

_LAYERS = {"Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer"}


class FusedLayer(NamedTuple):
    """Weights of a decoder layer; projections are [out, in], transposed views [in, out]."""

    norm: nn.Parameter
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None
    out: Tensor
    """[Hq * D, H]."""
    post_norm: nn.Parameter
    gate_up: Tensor
    down: Tensor
    """[I, H]."""


def supports(language_model: Any) -> bool:
    """Whether `FusedText` computes what this model computes."""
    layers, rope = language_model.layers, language_model.rotary_emb
    return (
        all(type(layer).__name__ in _LAYERS for layer in layers)
        and all(layer.self_attn.o_proj.bias is None for layer in layers)
        and rope.rope_type not in ("dynamic", "longrope")  # their tables depend on the length
    )


class FusedText:
    """The decoder of `language_model` for one token per row.

    Takes over the memory of its projections; build it anew after the model moved to another
    device or got new memory.
    """

    def __init__(self, language_model: Any) -> None:
        self.model = language_model
        attention = self.model.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.epsilon: float = self.model.norm.variance_epsilon
        self.activation = self.model.layers[0].mlp.act_fn
        self.layers = [_fuse(layer) for layer in self.model.layers]
        heads = self.layers[0].qkv.shape[0] // self.head_dim
        key_heads = attention.k_proj.weight.shape[0] // self.head_dim
        self.rotated = heads - key_heads
        """Query and key heads; the value heads after them are not rotated."""
        like = self.layers[0].qkv
        self._is_rotated = like.new_ones(heads, 1)
        self._is_rotated[self.rotated :] = 0
        self.query_heads = self.rotated - key_heads

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [length, D] of positions 0.. that are equal in all M-RoPE rows.

        The signs make `x * cos + roll(x, D / 2) * sin` the rotation.
        """
        like = self.layers[0].qkv
        positions = torch.arange(length, device=like.device).expand(3, 1, -1)
        cos, sin = self.model.rotary_emb(like, positions)
        cos, sin = (part.reshape(-1, length, self.head_dim)[0] for part in (cos, sin))
        half = self.head_dim // 2
        return cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)

    def __call__(
        self, embeds: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor], cache: GroupCache
    ) -> Tensor:
        """Hidden states [R, H] after the last norm.

        embeds: [R, H], overwritten; positions: [R] int64; tables: of `tables`, long enough.
        """
        cos, sin = (table.index_select(0, positions)[:, None] for table in tables)
        rotate = self._is_rotated
        cos, sin = torch.addcmul(1 - rotate, cos, rotate), sin * rotate
        hidden, half = embeds, self.head_dim // 2
        for index, layer in enumerate(self.layers):
            heads = F.linear(self._norm(hidden, layer.norm), layer.qkv, layer.qkv_bias)
            heads = heads.view(len(hidden), -1, self.head_dim)
            if layer.query_norm is not None:
                heads = self._norm_heads(heads, layer)
            heads = torch.addcmul(heads * cos, heads.roll(half, -1), sin)
            mixed = cache.attend(index, heads, self.scale)
            hidden.addmm_(mixed, layer.out)
            gate_up = F.linear(self._norm(hidden, layer.post_norm), layer.gate_up)
            gate, up = gate_up.chunk(2, -1)
            hidden.addmm_(self.activation(gate).mul_(up), layer.down)
        return self._norm(hidden, self.model.norm.weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.epsilon)

    def _norm_heads(self, heads: Tensor, layer: FusedLayer) -> Tensor:
        query, key, value = heads.split(
            [self.query_heads, self.rotated - self.query_heads, heads.shape[1] - self.rotated], 1
        )
        assert layer.query_norm is not None and layer.key_norm is not None
        query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
        return torch.cat([query, key, value], 1)


def _fuse(layer: Any) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    has_bias = attention.q_proj.bias is not None
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return FusedLayer(
        norm=layer.input_layernorm.weight,
        qkv=_joined([projection.weight for projection in projections]),
        qkv_bias=_joined([projection.bias for projection in projections]) if has_bias else None,
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        out=attention.o_proj.weight.t(),
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.t(),
    )


def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters stacked along dim 0; each becomes a view of the result."""
    joined = torch.cat([parameter.data for parameter in parameters])
    sizes = [len(parameter) for parameter in parameters]
    for parameter, view in zip(parameters, joined.split(sizes), strict=True):
        parameter.data = view
    return joined
