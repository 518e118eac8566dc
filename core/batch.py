"""From (prompt, completion) pairs to one packed row of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from speciarl.core.packing import Packing, packing
from speciarl.rollout.engine import Prompt


@dataclass(frozen=True, eq=False)
class Item:
    """A completion to be scored under a prompt. `ids` includes the stop token, if any."""

    prompt: Prompt
    ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch. T row tokens, C predicted tokens, M image tokens, S sequences.

    Neighbours with the same prompt share its tokens: they are computed once, and each completion
    sees them and itself (`packed`). input_ids [1, T]; positions [4, 1, T]: text positions that
    count from the start of the prompt, then the three M-RoPE rows; images: model
    inputs by name, each distinct prompt once; image_at [M]: row positions of the image tokens;
    feature_of [M]: which image feature goes there; rows [C]: the position whose hidden state
    predicts targets [C]; sequence_ids [C]: the item of each predicted token.
    """

    input_ids: Tensor
    positions: Tensor
    images: dict[str, Tensor]
    image_at: Tensor
    feature_of: Tensor
    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor
    packed: Packing


def pack(items: Sequence[Item], image_token_id: int, device: torch.device) -> PackedBatch:
    """Packs the items in order. A prompt that comes again later still shares its image.

    Raises:
        ValueError: no items, or an item without a completion.
    """
    if not items or any(len(item.ids) == 0 for item in items):
        raise ValueError("a packed batch needs items, each with at least one completion token")
    ids: list[int] = []
    rows: list[int] = []
    positions, image_at, feature_of = [], [], []
    trees: list[tuple[int, list[int]]] = []
    first_feature: dict[int, int] = {}
    pictured: list[Prompt] = []
    features = root = 0
    shared: Prompt | None = None
    for item in items:
        prompt = item.prompt
        length, own = len(prompt.input_ids), len(item.ids) - 1
        if prompt is not shared:
            shared, root = prompt, len(ids)
            where = (prompt.input_ids == image_token_id).nonzero().squeeze(1).numpy()
            if id(prompt) not in first_feature:
                first_feature[id(prompt)] = features
                features += len(where)
                if prompt.images:
                    pictured.append(prompt)
            image_at.append(root + where)
            feature_of.append(first_feature[id(prompt)] + np.arange(len(where)))
            positions.append(np.concatenate([np.arange(length)[None], prompt.positions.numpy()]))
            ids.extend(prompt.input_ids.tolist())
            trees.append((length, []))
        # The prompt's last token predicts the first; the last is predicted, never read.
        rows.append(root + length - 1)
        rows.extend(range(len(ids), len(ids) + own))
        first = np.array([[length]] + [[prompt.next_position]] * 3)
        positions.append(first + np.arange(own))
        ids.extend(item.ids[:-1])
        trees[-1][1].append(own)
    names = pictured[0].images if pictured else {}

    def move(array: np.ndarray | list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(array)).to(device, non_blocking=True)

    lengths = [len(item.ids) for item in items]
    return PackedBatch(
        input_ids=move(ids)[None],
        positions=move(np.concatenate(positions, axis=1))[:, None],
        images={
            name: torch.cat([p.images[name] for p in pictured]).to(device, non_blocking=True)
            for name in names
        },
        image_at=move(np.concatenate(image_at)),
        feature_of=move(np.concatenate(feature_of)),
        rows=move(rows),
        targets=move([token for item in items for token in item.ids]),
        sequence_ids=move(np.repeat(np.arange(len(items)), lengths)),
        packed=packing(trees, device),
    )
