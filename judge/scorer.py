"""Label scores of a local model: one forward of the pairs, after a prefix computed once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

FULL_PRECISION_GAP = 1e-3
HALF_PRECISION_GAP = 0.5
"""Nats by which scores after the shared prefix may differ from those of whole prompts. A cache
that does not fit the model is off by several; rounding in bf16 is off by up to 0.2."""


class LabelHead(nn.Module):
    """Stands where the output matrix stood: the labels' logits, at one position of each row.

    What the model does to its logits (scale, soft cap) still happens after it. The six rows are
    fp32: logits rounded to bf16 would round the margin to 0.1 nats.
    """

    def __init__(self, head: Any, labels: Sequence[int]) -> None:
        super().__init__()
        rows = torch.tensor(labels, device=head.weight.device)
        bias = getattr(head, "bias", None)
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", head.weight.detach()[rows].float())
        self.register_buffer("bias", None if bias is None else bias.detach()[rows].float())
        self.last = rows
        """[B] int64: the position in each row of the next batch."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] to [B, 1, labels] fp32."""
        rows = hidden[torch.arange(len(hidden), device=hidden.device), self.last]
        return functional.linear(rows.float(), self.weight, self.bias)[:, None]


class _SharedLayer(DynamicLayer):
    """Keys and values of the prefix [1, Hkv, P, D]. A batch attends to them and to its own, which
    are not kept: one layer at a time holds a copy of the prefix for every row."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)


def shared_prefix(model: Any, **inputs: Any) -> Cache:
    """The cache of one prompt [1, P], for batches of any number of rows that go on from it.

    Made without the model's configuration, so that no layer forgets what is outside its window:
    masks see to windows, and every layer has the prefix whole.
    """
    whole = DynamicCache()
    model(**inputs, past_key_values=whole, use_cache=True)
    layers: list[Any] = whole.layers
    return Cache([_SharedLayer(layer.keys, layer.values) for layer in layers])


class LabelScorer:
    """Scores of `labels` as the token after a head and a suffix, for batches of suffixes.

    model: a causal or image-text-to-text model of transformers, which the scorer keeps: its output
    matrix is replaced. Several judges may ask one scorer, each with its head, each under `lock`.
    `shared` tells whether a head's cache serves all rows; a model whose cache cannot be shared
    reads whole prompts (with a warning) to the same scores.
    """

    def __init__(self, model: Any, labels: Sequence[int]) -> None:
        self._model = model.eval().requires_grad_(False)
        self._labels = LabelHead(model.get_output_embeddings(), labels)
        model.set_output_embeddings(self._labels)
        self._prefixes: dict[tuple[int, ...], Cache] = {}
        self._host: list[Tensor] | None = None
        self._device = self._labels.last.device
        self.lock = threading.Lock()
        self.awake = True
        self.shared = True

    @torch.inference_mode()
    def scores(self, head: tuple[int, ...], suffixes: Sequence[Sequence[int]]) -> Tensor:
        """[B, labels] fp32 on the CPU: logits after head + each suffix, all of them ids.

        Padding stands right of the suffixes, where causal attention never looks back from.
        """
        rows = suffixes if self.shared else [[*head, *suffix] for suffix in suffixes]
        before = len(head) if self.shared else 0
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        last = torch.tensor([len(row) - 1 for row in rows])
        return self._forward(ids, last, before, self._cache(head) if self.shared else None).cpu()

    def verify(self, head: tuple[int, ...], suffixes: Sequence[Sequence[int]]) -> None:
        """Sees that the shared prefix changes no score; falls back to whole prompts if it does."""
        try:
            found = self.scores(head, suffixes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a cache of another kind raises
            self._unshare(f"{type(error).__name__}: {error}")
            return
        self.shared = False
        gap = float((found - self.scores(head, suffixes)).abs().max())
        full = next(self._model.parameters()).dtype == torch.float32
        if gap <= (FULL_PRECISION_GAP if full else HALF_PRECISION_GAP):
            self.shared = True
        else:
            self._unshare(f"its scores are off by {gap:.2g} nats")

    def sleep(self) -> None:
        """Weights to the host, where a copy stays from then on; prefixes are forgotten."""
        if not self.awake:
            return
        if self._host is None:
            self._host = [_backup(tensor) for tensor in self._tensors()]
        for tensor, copy in zip(self._tensors(), self._host, strict=True):
            tensor.data = copy
        self._prefixes.clear()
        self.awake = False
        torch.cuda.empty_cache()

    def wake(self) -> None:
        """Weights back on their device."""
        if not self.awake:
            for tensor in self._tensors():
                tensor.data = tensor.data.to(self._device, non_blocking=True)
            self.awake = True

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._model.parameters()
        yield from self._model.buffers()

    def _unshare(self, why: str) -> None:
        self.shared = False
        self._prefixes.clear()
        name = type(self._model).__name__
        warnings.warn(
            f"{name} cannot share the cache of the judge's instructions ({why}): every pair reads "
            "the whole prompt, which is slower",
            stacklevel=2,
        )

    def _cache(self, head: tuple[int, ...]) -> Cache:
        """The head's keys and values, computed when first needed."""
        if head not in self._prefixes:
            ids = torch.tensor([head], device=self._device)
            self._labels.last = ids.new_tensor([-1])
            positions = torch.arange(ids.shape[1], device=self._device)[None]
            prefix = shared_prefix(self._model, input_ids=ids, position_ids=positions)
            self._prefixes[head] = prefix
        return self._prefixes[head]

    def _forward(self, ids: Tensor, last: Tensor, before: int, cache: Cache | None) -> Tensor:
        """[B, labels] fp32. ids [B, S]; last [B]; before: how many tokens precede them."""
        self._labels.last = last.to(self._device)
        positions = torch.arange(before, before + ids.shape[1], device=self._device)
        out = self._model(
            input_ids=ids.to(self._device),
            # Given, or a multimodal model would take them from its last prompt with images.
            position_ids=positions.expand(len(ids), -1),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.logits[:, 0].float()


def _backup(tensor: Tensor) -> Tensor:
    """A copy on the host, from which the device reads directly."""
    pin = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor.detach())
