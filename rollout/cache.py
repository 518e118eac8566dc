"""Keys and values of a wave: each prompt once, and the generated tokens of its samples.

Samples of a prompt attend to one copy of its keys and values, as one matrix product per prompt,
and to their own tokens as one small product per sample. That is the attention over the prompt's
cache repeated for every sample, without the repeated memory and its traffic.

A wave has P prompts and R rows (samples). Attention works on a rectangle of slots [P, N], N the
most rows that any prompt has; slots without a row repeat row 0 and are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "speciarl_rollout"
_FIRST_BLOCK = 64


class Slots(NamedTuple):
    """Which row sits where. `Hkv` heads of keys; flat slot = (prompt * Hkv + head) * N + rank."""

    width: int
    """N."""
    rows: Tensor
    """[P * Hkv * N] int64: flat (row * Hkv + head) of each slot."""
    slots: Tensor
    """[R * Hkv] int64: flat slot of each (row, head)."""


def assign_slots(owner: np.ndarray, prompts: int, heads: int, device: torch.device) -> Slots:
    """Give every row a slot at its prompt.

    owner: [R] int, the prompt of each row, in [0, prompts).
    """
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=prompts)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner)) - starts[owner[order]]
    width = int(counts.max())
    head = np.arange(heads)
    slots = ((owner[:, None] * heads + head) * width + rank[:, None]).reshape(-1)
    rows = np.zeros(prompts * heads * width, dtype=np.int64)
    rows[slots] = np.arange(len(slots))
    return Slots(width, torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device))


class Layer:
    """Buffers of one decoder layer.

    prompt_keys, prompt_values: [P, Hkv, L, D]; own_keys, own_values: [slots, capacity, D].
    """

    def __init__(self, prompts: int, length: int, like: Tensor) -> None:
        shape = (prompts, like.shape[1], length, like.shape[3])
        self.prompt_keys = like.new_zeros(shape)  # zeros: masked columns must still be finite
        self.prompt_values = like.new_zeros(shape)
        self.own_keys = like.new_empty(0)
        self.own_values = like.new_empty(0)

    def open(self, slots: int, capacity: int) -> None:
        """Room for the rows' own tokens."""
        shape = (slots, capacity, self.prompt_keys.shape[3])
        self.own_keys = self.prompt_keys.new_empty(shape)
        self.own_values = self.prompt_keys.new_empty(shape)

    def grow(self, capacity: int) -> None:
        """More room; what is there stays."""
        self.own_keys = _widened(self.own_keys, capacity)
        self.own_values = _widened(self.own_values, capacity)

    def keep(self, prompts: Tensor | None, length: int, source: Tensor, used: int) -> None:
        """Keep these prompts (None: all), cut to `length`; slot i takes slot source[i]'s tokens."""
        if prompts is not None:
            self.prompt_keys = self.prompt_keys[:, :, :length].index_select(0, prompts)
            self.prompt_values = self.prompt_values[:, :, :length].index_select(0, prompts)
        self.own_keys = _moved(self.own_keys, source, used)
        self.own_values = _moved(self.own_values, source, used)


def _widened(buffer: Tensor, capacity: int) -> Tensor:
    wide = buffer.new_empty((buffer.shape[0], capacity, buffer.shape[2]))
    wide[:, : buffer.shape[1]] = buffer
    return wide


def _moved(buffer: Tensor, source: Tensor, used: int) -> Tensor:
    """Reorder in place: the selection is a copy, so writing it back is safe."""
    buffer[: len(source), :used] = buffer[:, :used].index_select(0, source)
    return buffer[: len(source)]


class GroupCache:
    """The cache of one wave, handed through the model to `attend`.

    First every prompt passes once (`place`, then a forward per chunk), then `open` names the
    rows, then each forward adds one token per row and `advance` closes it.
    """

    def __init__(self, lengths: Sequence[int], limit: int, device: torch.device) -> None:
        """lengths: [P] tokens of each prompt; limit: most tokens a row can feed."""
        self.lengths = np.asarray(lengths)
        self.limit = limit
        self.device = device
        self.used = 0
        self._first = 0
        self._layers: dict[int, Layer] = {}
        self._slots: Slots | None = None
        self._owner = np.empty(0, dtype=np.int64)
        self._bias: Tensor | None = None

    def place(self, first: int) -> None:
        """The next forward holds the prompts from `first` on, padded on the right."""
        self._first = first

    def open(self, owner: np.ndarray) -> None:
        """Prompts are complete; owner: [R] the prompt of each row to come."""
        self._seat(owner)
        assert self._slots is not None
        for layer in self._layers.values():
            layer.open(len(self._slots.rows), min(self.limit, _FIRST_BLOCK))

    def advance(self) -> None:
        """The forward of one token per row is over."""
        self.used += 1
        capacity = next(iter(self._layers.values())).own_keys.shape[1]
        if self.used == capacity < self.limit:
            for layer in self._layers.values():
                layer.grow(min(self.limit, 2 * capacity))

    def keep(self, rows: np.ndarray) -> None:
        """Drop all rows but these (indices, ascending), and prompts that no row needs."""
        assert self._slots is not None
        heads = self._heads
        before = self._slots.slots.view(-1, heads)
        alive, owner = np.unique(self._owner[rows], return_inverse=True)
        dropped = len(alive) < len(self.lengths)
        self.lengths = self.lengths[alive]
        self._seat(owner)
        kept = before.index_select(0, torch.from_numpy(rows).to(self.device)).view(-1)
        source = kept.index_select(0, self._slots.rows)
        prompts = torch.from_numpy(alive).to(self.device) if dropped else None
        for layer in self._layers.values():
            layer.keep(prompts, int(self.lengths.max()), source, self.used)

    @property
    def opened(self) -> bool:
        """Whether forwards add tokens of rows (else: prompts)."""
        return self._slots is not None

    @property
    def _heads(self) -> int:
        return next(iter(self._layers.values())).prompt_keys.shape[1]

    def _seat(self, owner: np.ndarray) -> None:
        self._owner = owner
        self._slots = assign_slots(owner, len(self.lengths), self._heads, self.device)
        column = np.arange(self.lengths.max())
        padding = column >= self.lengths[:, None]
        self._bias = None
        if padding.any():
            bias = np.where(padding, -np.inf, 0.0).astype(np.float32).repeat(self._heads, axis=0)
            self._bias = torch.from_numpy(bias[:, None]).to(self.device)

    def store(self, index: int, key: Tensor, value: Tensor) -> None:
        """Keep the prompts of a chunk; key, value: [p, Hkv, l, D] of decoder layer `index`."""
        if index not in self._layers:
            self._layers[index] = Layer(len(self.lengths), int(self.lengths.max()), key)
        layer, rows = self._layers[index], slice(self._first, self._first + len(key))
        layer.prompt_keys[rows, :, : key.shape[2]] = key
        layer.prompt_values[rows, :, : key.shape[2]] = value

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one new token per row over its prompt and its own tokens.

        query: [R, Hq, 1, D]; key, value: [R, Hkv, 1, D]. Returns [R, 1, Hq, D].
        """
        layer, slots, now = self._layers[index], self._slots, self.used + 1
        assert slots is not None
        rows, heads, _, size = key.shape
        shared = query.shape[1] // heads  # query heads per key head
        pairs, length = layer.prompt_keys.shape[0] * heads, layer.prompt_keys.shape[2]
        seated = (query * scale).reshape(rows * heads, shared * size).index_select(0, slots.rows)
        layer.own_keys[:, now - 1] = key.reshape(-1, size).index_select(0, slots.rows)
        layer.own_values[:, now - 1] = value.reshape(-1, size).index_select(0, slots.rows)

        by_prompt = (pairs, slots.width * shared, -1)
        by_slot = (pairs * slots.width, shared, -1)
        far = _scores(seated.view(by_prompt), layer.prompt_keys.view(pairs, length, size))
        if self._bias is not None:
            far += self._bias
        near = _scores(seated.view(by_slot), layer.own_keys[:, :now]).view(by_prompt)
        weights = torch.cat([far, near], -1).softmax(-1).to(value.dtype)
        out = torch.bmm(weights[..., :length], layer.prompt_values.view(pairs, length, size))
        own = weights[..., length:].view(by_slot)
        out = torch.baddbmm(out.view(by_slot), own, layer.own_values[:, :now])
        out = out.view(-1, shared * size).index_select(0, slots.slots)
        return out.view(rows, 1, heads * shared, size)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Batched query @ key^T, at least in fp32, whatever the dtype of the inputs."""
    key = key.transpose(1, 2)
    if query.dtype in (torch.float32, torch.float64):
        return torch.bmm(query, key)
    if query.is_cuda:
        return torch.bmm(query, key, out_dtype=torch.float32)
    return torch.bmm(query.float(), key.float())


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    group_cache: GroupCache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a GroupCache passed through the language model.

    query: [B, Hq, l, D], key, value: [B, Hkv, l, D]. Returns [B, l, Hq, D].

    Prompts are padded on the right, so the causal rule alone hides the padding from them, and no
    mask is built. Raises ValueError for attention that this is not equal to.
    """
    if group_cache is None:
        raise ValueError("this model belongs to a rollout engine; run a copy of it instead")
    if attention_mask is not None or sliding_window is not None or softcap is not None:
        raise ValueError("the native engine knows only full causal attention")
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if group_cache.opened:
        return group_cache.attend(index, query, key, value, scaling), None
    group_cache.store(index, key, value)
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)


# No mask function is registered under this name: transformers then builds no mask at all.
AttentionInterface.register(ATTENTION, rollout_attention)
