"""From prompts to the inputs of the language model: padding, positions, image features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from speciarl.rollout.engine import Prompt


def chunks(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Runs of prompts whose padded size (count x longest) stays in `budget` tokens.

    A prompt longer than the budget runs alone.
    """
    first, longest = 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > first and (index + 1 - first) * longest > budget:
            yield slice(first, index)
            first, longest = index, length
    yield slice(first, len(lengths))


def language_inputs(model: Any, prompts: Sequence[Prompt], device: Any) -> dict[str, Any]:
    """Arguments of the language model for prompts [P] padded on the right to L.

    Returns: inputs_embeds [P, L, H], position_ids [3, P, L] int64 (M-RoPE) or [P, L], and
        Qwen3-VL's deep-stack features where the model has them.

    Raises ValueError when placeholders and image features differ in number.
    """
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.input_ids)] = prompt.input_ids
        positions[:, row, : len(prompt.input_ids)] = prompt.positions
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(ids.to(device)),
        "position_ids": text_positions(model, positions.to(device)),
    }
    with_images = [prompt for prompt in prompts if prompt.images]
    if with_images:
        placeholder = model.config.image_token_id
        pooled, deep = _image_features(model.model, with_images, placeholder, device)
        where = (ids == placeholder).view(-1).nonzero().squeeze(1).to(device)
        embeds = inputs["inputs_embeds"]
        embeds.view(-1, embeds.shape[-1]).index_copy_(0, where, pooled.to(embeds.dtype))
        if deep:
            inputs["visual_pos_masks"] = (ids == placeholder).to(device)
            inputs["deepstack_visual_embeds"] = deep
    return inputs


def text_positions(model: Any, positions: Tensor) -> Tensor:
    """Position ids in the model's form: [3, B, l] where it has M-RoPE, else the first row."""
    return positions if hasattr(model.model, "get_rope_index") else positions[0]


def _image_features(
    base: Any, prompts: Sequence[Prompt], placeholder: int, device: Any
) -> tuple[Tensor, list[Tensor]]:
    """Features [tokens, H] of the prompts' images in order, and the same per deep-stack level.

    Prompts that hold the very same pixel tensor share one pass of the vision tower.
    """
    name = next(iter(prompts[0].images))
    first: dict[int, int] = {}
    owners = [first.setdefault(id(prompt.images[name]), len(first)) for prompt in prompts]
    unique = [prompts[owners.index(number)] for number in range(len(first))]
    joined = {
        key: torch.cat([p.images[key] for p in unique]).to(device) for key in unique[0].images
    }
    output = base.get_image_features(**joined, return_dict=True)
    pooled = _joined(output.pooler_output)
    counts = [int((prompt.input_ids == placeholder).sum()) for prompt in unique]
    if sum(counts) != len(pooled):
        keys = ", ".join(prompt.key for prompt in unique)
        raise ValueError(f"{sum(counts)} image placeholders, {len(pooled)} features: {keys}")

    def in_order(features: Tensor) -> Tensor:
        if len(unique) == len(prompts):
            return features
        parts = features.split(counts)
        return torch.cat([parts[number] for number in owners])

    levels = getattr(output, "deepstack_features", None) or []
    return in_order(pooled), [in_order(_joined(level)) for level in levels]


def _joined(features: Tensor | Sequence[Tensor]) -> Tensor:
    """One tensor: transformers gives one per image or one for all, by version."""
    return features if isinstance(features, Tensor) else torch.cat(list(features))
