"""From (prompt, completion) pairs to one packed row of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speciarl.core.attention import Packing, packing
from speciarl.rollout.engine import Prompt


@dataclass(frozen=True, eq=False)
class Item:
    """A completion to be scored under a prompt. `ids` includes the stop token, if any."""

    prompt: Prompt
    ids: Sequence[int]

    @property
    def cost(self) -> int:
        """Tokens of the sequence in a row: the last token is predicted, never read."""
        return len(self.prompt.input_ids) + len(self.ids) - 1


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch. T row tokens, C predicted tokens, M image tokens, S sequences.

    input_ids [1, T]; positions [4, 1, T]: text positions that restart at each sequence (from
    them transformers tells the sequences apart), then the three M-RoPE rows; images: model
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
    """Packs the items in order. Prompts that occur several times share one image.

    Raises:
        ValueError: no items, or an item without a completion.
    """
    if not items or any(len(item.ids) == 0 for item in items):
        raise ValueError("a packed batch needs items, each with at least one completion token")
    ids, positions, rows, targets, image_at, feature_of = [], [], [], [], [], []
    first_feature: dict[int, int] = {}
    pictured: list[Prompt] = []
    features = start = 0
    for item in items:
        prompt, completion = item.prompt, torch.tensor(item.ids, dtype=torch.long)
        length, new = len(prompt.input_ids), len(item.ids)
        ids.append(torch.cat([prompt.input_ids, completion[:-1]]))
        after = prompt.positions.max() + 1 + torch.arange(new - 1)
        spatial = torch.cat([prompt.positions, after.expand(3, -1)], 1)
        positions.append(torch.cat([torch.arange(length + new - 1)[None], spatial]))
        rows.append(start + length - 1 + torch.arange(new))
        targets.append(completion)
        where = (prompt.input_ids == image_token_id).nonzero().squeeze(1)
        if id(prompt) not in first_feature:
            first_feature[id(prompt)] = features
            features += len(where)
            if prompt.images:
                pictured.append(prompt)
        image_at.append(start + where)
        feature_of.append(first_feature[id(prompt)] + torch.arange(len(where)))
        start += length + new - 1
    names = pictured[0].images if pictured else {}

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    return PackedBatch(
        input_ids=move(torch.cat(ids)[None]),
        positions=move(torch.cat(positions, 1)[:, None]),
        images={name: move(torch.cat([p.images[name] for p in pictured])) for name in names},
        image_at=move(torch.cat(image_at)),
        feature_of=move(torch.cat(feature_of)),
        rows=move(torch.cat(rows)),
        targets=move(torch.cat(targets)),
        sequence_ids=move(
            torch.repeat_interleave(
                torch.arange(len(items)), torch.tensor([len(item.ids) for item in items])
            )
        ),
        packed=packing([item.cost for item in items], device),
    )
