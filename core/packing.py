"""Who sees whom in a packed row of trees: a prompt, then the completions that share it.

A prompt's tokens see the prompt so far; a completion's tokens see the whole prompt and their own
completion so far. So N samples cost one prompt and N completions, not N of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Tree = tuple[int, Sequence[int]]
"""(tokens of the prompt, tokens of each completion), as they follow in the row."""


@dataclass(frozen=True, eq=False)
class Block:
    """Segments of one kind as a padded rectangle, for torch's SDPA.

    q_at [S * Lq], k_at [S * Lk]: the row position of each slot (padding repeats position 0).
    mask [S, 1, Lq, Lk] bool, or None where causality alone keeps padding out of sight.
    """

    segments: int
    q_at: Tensor
    k_at: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Packing:
    """The index tensors of a row, on the device.

    As padded rectangles: `blocks`, and `unpad` [T], the slot of each row position. As segments of
    variable length, in row order: `cu_q`, `cu_k` [S+1] int32, and `keys` [K], the row positions of
    all segments' keys (None: a segment's keys are its own tokens); causality is aligned at the
    end of a segment's keys.
    """

    blocks: tuple[Block, ...]
    unpad: Tensor
    cu_q: Tensor
    cu_k: Tensor
    keys: Tensor | None
    longest_q: int
    longest_k: int


class Segment(NamedTuple):
    """A prompt, or a completion with the prompt that it sees."""

    start: int
    length: int
    prompt: Segment | None

    @property
    def keys(self) -> list[np.ndarray]:
        """Row positions that its last token sees."""
        own = np.arange(self.start, self.start + self.length)
        return [own] if self.prompt is None else [*self.prompt.keys, own]


def segments_of(trees: Sequence[Tree]) -> list[Segment]:
    """In row order. A completion of no tokens (the prompt predicts its only one) has none."""
    out: list[Segment] = []
    at = 0
    for length, completions in trees:
        prompt = Segment(at, length, None)
        out.append(prompt)
        at += length
        for own in completions:
            if own:
                out.append(Segment(at, own, prompt))
                at += own
    return out


def packing(trees: Sequence[Tree], device: torch.device) -> Packing:
    """Index tensors of a row, made on the host and moved once."""

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    segments = segments_of(trees)
    keys = [s.keys for s in segments]
    lengths_q = [s.length for s in segments]
    lengths_k = [sum(len(part) for part in parts) for parts in keys]
    branches = [s for s in segments if s.prompt is not None]
    blocks, slots, used = [], {}, 0
    for part in ([s for s in segments if s.prompt is None], branches):
        if part:
            width = max(s.length for s in part)
            for index, s in enumerate(part):
                slots[s.start] = used + index * width + np.arange(s.length)
            used += len(part) * width
            q_at, k_at, mask = _rectangle(part)
            blocks.append(
                Block(len(part), move(q_at), move(k_at), None if mask is None else move(mask))
            )
    return Packing(
        blocks=tuple(blocks),
        unpad=move(np.concatenate([slots[s.start] for s in segments])),
        cu_q=move(np.cumsum([0, *lengths_q], dtype=np.int32)),
        cu_k=move(np.cumsum([0, *lengths_k], dtype=np.int32)),
        keys=move(np.concatenate([a for parts in keys for a in parts])) if branches else None,
        longest_q=max(lengths_q),
        longest_k=max(lengths_k),
    )


def _rectangle(part: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(q_at, k_at, mask) of segments of one kind; a completion's keys: its prompt's, its own."""
    own_at, _ = _padded_spans(part)
    if part[0].prompt is None:
        return own_at.reshape(-1), own_at.reshape(-1), None
    prompt_at, seen = _padded_spans([s.prompt for s in part if s.prompt is not None])
    count, size = own_at.shape
    causal = np.tri(size, dtype=bool)
    mask = np.concatenate(
        [
            np.broadcast_to(seen[:, None], (count, size, seen.shape[1])),
            np.broadcast_to(causal, (count, size, size)),
        ],
        axis=2,
    )
    k_at = np.concatenate([prompt_at, own_at], axis=1)
    return own_at.reshape(-1), k_at.reshape(-1), mask[:, None]


def _padded_spans(part: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Row positions [S, L], 0 past a segment's end, and which are inside."""
    starts = np.array([s.start for s in part])[:, None]
    lengths = np.array([s.length for s in part])[:, None]
    slot = np.arange(lengths.max())
    inside = slot < lengths
    return np.where(inside, starts + slot, 0), inside
