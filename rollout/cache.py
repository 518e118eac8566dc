"""Keys and values of a wave: each prompt once, and the generated tokens of its samples.

Samples of a prompt attend to one copy of its keys and values, as one matrix product per prompt,
and to their own tokens as one small product per sample. That is the attention over the prompt's
cache repeated for every sample, without the repeated memory and its traffic.

A wave has P prompts and R rows (distinct beginnings of completions). Attention works on a rectangle
of slots [P, N], N the most rows that any prompt has; slots without a row repeat row 0.
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
_FIRST_BLOCK = 16


class Slots(NamedTuple):
    """Which row sits where. Flat slot = (prompt * Hkv + key head) * N + rank."""

    width: int
    """N."""
    rows: Tensor
    """[P * Hkv * N] int64: flat (row * Hkv + key head) of each slot."""
    slots: Tensor
    """[R * Hkv] int64: flat slot of each (row, key head)."""


def assign_slots(owner: np.ndarray, prompts: int, heads: int, device: torch.device) -> Slots:
    """Give every row a slot at its prompt.

    owner: [R] int, the prompt of each row, in [0, prompts); heads: Hkv.
    """
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=prompts)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner)) - starts[owner[order]]
    width = int(counts.max())
    slots = ((owner[:, None] * heads + np.arange(heads)) * width + rank[:, None]).reshape(-1)
    rows = np.zeros(prompts * heads * width, dtype=np.int64)
    rows[slots] = np.arange(len(slots))
    return Slots(width, torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device))


def _gather(rows: Tensor, key_heads: int, query_heads: int) -> Tensor:
    """Where each slot's heads are in [R * (Hq + 2 Hkv)] heads: all queries, then keys, values."""
    row, head = rows // key_heads, rows % key_heads
    first = row * (query_heads + 2 * key_heads)
    shared = query_heads // key_heads
    own = torch.arange(shared, device=rows.device)
    queries = (first + head * shared)[:, None] + own
    keys = first + query_heads + head
    return torch.cat([queries.view(-1), keys, keys + key_heads])


class Layer:
    """Keys and values (dim 0) of a decoder layer: prompt [2, P, Hkv, L, D], own [2, slots, C, D]
    with room for C generated tokens."""

    def __init__(self, prompts: int, length: int, like: Tensor) -> None:
        # Zeros: columns that are padding get no weight, but must be finite.
        self.prompt = like.new_zeros((2, prompts, like.shape[1], length, like.shape[3]))
        self._room = self.own = like.new_empty(0)

    def open(self, slots: int, most: int, capacity: int) -> None:
        """Room for the own tokens of `most` slots, `slots` of which are there now."""
        self._room = self.prompt.new_empty((2, most, capacity, self.prompt.shape[-1]))
        self.own = self._room[:, :slots]

    def grow(self, capacity: int) -> None:
        """Room for more tokens; what is there stays."""
        before = self.own
        self.open(before.shape[1], self._room.shape[1], capacity)
        self.own[:, :, : before.shape[2]] = before

    def select(self, prompts: Tensor | None, length: int, source: Tensor, used: int) -> None:
        """Keep these prompts (None: all), cut to `length`; slot i takes slot source[i]'s tokens."""
        if prompts is not None:
            self.prompt = self.prompt[:, :, :, :length].index_select(1, prompts)
        taken = self.own[:, :, :used].index_select(1, source)
        self.own = self._room[:, : len(source)]
        self.own[:, :, :used] = taken


class GroupCache:
    """The cache of one wave, handed through the model to `attend`.

    First every prompt passes once (`place`, then a forward per chunk); `open` makes a row of each;
    `select` forks and drops rows; each forward adds one token per row and `advance` closes it.
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
        self._gather = torch.empty(0)
        self._query_heads = 0
        self._owner = np.empty(0, dtype=np.int64)
        self._bias: Tensor | None = None

    def place(self, first: int) -> None:
        """The next forward holds the prompts from `first` on, padded on the right."""
        self._first = first

    def open(self, query_heads: int, width: int) -> None:
        """Prompts are complete and become one row each; later at most `width` rows each."""
        self._query_heads = query_heads
        prompts = len(self.lengths)
        self._seat(np.arange(prompts))
        heads, capacity = self._heads, min(self.limit, _FIRST_BLOCK)
        for layer in self._layers.values():
            layer.open(prompts * heads, prompts * heads * width, capacity)

    def advance(self) -> None:
        """The forward of one token per row is over."""
        self.used += 1
        capacity = next(iter(self._layers.values())).own.shape[2]
        if self.used == capacity < self.limit:
            for layer in self._layers.values():
                layer.grow(min(self.limit, 2 * capacity))

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes a copy of row rows[i] (int, ascending); unused prompts are dropped."""
        assert self._slots is not None
        before = self._slots.slots.view(-1, self._heads)
        alive, owner = np.unique(self._owner[rows], return_inverse=True)
        dropped = len(alive) < len(self.lengths)
        self.lengths = self.lengths[alive]
        self._seat(owner)
        taken = before.index_select(0, torch.from_numpy(rows).to(self.device)).view(-1)
        source = taken.index_select(0, self._slots.rows)
        prompts = torch.from_numpy(alive).to(self.device) if dropped else None
        for layer in self._layers.values():
            layer.select(prompts, int(self.lengths.max()), source, self.used)

    @property
    def opened(self) -> bool:
        """Whether forwards add tokens of rows (else: prompts)."""
        return self._slots is not None

    @property
    def _heads(self) -> int:
        return next(iter(self._layers.values())).prompt.shape[2]

    def _seat(self, owner: np.ndarray) -> None:
        self._owner = owner
        self._slots = assign_slots(owner, len(self.lengths), self._heads, self.device)
        self._gather = _gather(self._slots.rows, self._heads, self._query_heads)
        padding = np.arange(self.lengths.max()) >= self.lengths[:, None]
        self._bias = None
        if padding.any():
            bias = np.where(padding, -np.inf, 0.0).astype(np.float32).repeat(self._heads, axis=0)
            self._bias = torch.from_numpy(bias[:, None]).to(self.device)

    def store(self, index: int, key: Tensor, value: Tensor) -> None:
        """Keep the prompts of a chunk; key, value: [p, Hkv, l, D] of decoder layer `index`."""
        if index not in self._layers:
            self._layers[index] = Layer(len(self.lengths), int(self.lengths.max()), key)
        rows = slice(self._first, self._first + len(key))
        for place, new in zip(self._layers[index].prompt, (key, value), strict=True):
            place[rows, :, : key.shape[2]] = new

    def attend(self, index: int, heads: Tensor, scale: float) -> Tensor:
        """Attention of one new token per row over its prompt and its own tokens.

        heads: [R, Hq + 2 Hkv, D] queries, keys, values, rotated. Returns [R, Hq * D].
        """
        layer, slots, now = self._layers[index], self._slots, self.used + 1
        assert slots is not None
        _, prompts, key_heads, length, size = layer.prompt.shape
        pairs, seats = prompts * key_heads, len(slots.rows)
        shared = self._query_heads // key_heads  # query heads per key head
        seated = heads.view(-1, size).index_select(0, self._gather)
        layer.own[:, :, now - 1] = seated[seats * shared :].view(2, seats, size)
        query = seated[: seats * shared]

        by_prompt = (pairs, slots.width * shared, -1)
        by_slot = (seats, shared, -1)
        keys, values = layer.prompt.view(2, pairs, length, size)
        own_keys, own_values = layer.own[:, :, :now]
        far = _products(query.view(by_prompt), keys)
        near = _products(query.view(by_slot), own_keys).view(by_prompt)
        scores = torch.cat([far, near], -1).mul_(scale)
        if self._bias is not None:
            scores[..., :length] += self._bias
        weights = scores.softmax(-1).to(heads.dtype)
        out = torch.bmm(weights[..., :length], values).view(by_slot)
        out.baddbmm_(weights[..., length:].view(by_slot), own_values)
        return out.view(seats, -1).index_select(0, slots.slots).view(len(heads), -1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Batched query @ key^T, at least in fp32 whatever the inputs' dtype."""
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
        heads = torch.cat([query, key, value], 1).squeeze(2)
        return group_cache.attend(index, heads, scaling)[:, None], None
    group_cache.store(index, key, value)
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)


# No mask function is registered under this name: transformers then builds no mask at all.
AttentionInterface.register(ATTENTION, rollout_attention)
