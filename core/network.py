"""The network: a transformers vision-language model that scores a packed row of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speciarl.core.batch import PackedBatch
from speciarl.kernels.fused import linear_policy_loss
from speciarl.kernels.head import linear_logprob


class LogProbHead(nn.Linear):
    """The output layer under its own name, `lm_head.weight`, with the log-prob inside.

    The product must happen in this module's forward: only there is its weight gathered.
    """

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        loss: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Any:
        """hidden [C, H] and targets [C] -> log-probs [C] fp32 (and entropy), or, with the arguments
        of a policy loss, that loss and its statistics; without targets, plain logits, as
        transformers' own code expects."""
        if targets is None:
            return super().forward(hidden)
        if loss is not None:
            return linear_policy_loss(hidden, self.weight, targets, **loss, **how)
        return linear_logprob(hidden, self.weight, targets, **how)


class PackedVLM(nn.Module):
    """The root FSDP unit: packed tokens and images in, log-probs of the targets, or a loss, out."""

    def __init__(self, model: nn.Module, route: str) -> None:
        super().__init__()
        self.model = model
        self.route = route

    def forward(self, batch: PackedBatch, **how: Any) -> Any:
        """What the head makes of `batch.targets`; `how` goes to it (temperature, banned, ...)."""
        inner: Any = self.model.model
        embeds = inner.get_input_embeddings()(batch.input_ids)
        extra: dict[str, Any] = {}
        if batch.images:
            vision = inner.get_image_features(**batch.images, return_dict=True)
            features = _joined(vision.pooler_output).index_select(0, batch.feature_of)
            embeds = embeds.index_copy(1, batch.image_at, features[None].to(embeds.dtype))
            deep = getattr(vision, "deepstack_features", None)
            if deep is not None:
                mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
                extra["visual_pos_masks"] = mask.index_fill(1, batch.image_at, True)
                extra["deepstack_visual_embeds"] = [
                    _joined(level).index_select(0, batch.feature_of) for level in deep
                ]
        hidden = inner.language_model(
            inputs_embeds=embeds,
            position_ids=batch.positions,
            attention_mask=None,
            use_cache=False,
            packed=batch.packed,
            route=self.route,
            **extra,
        ).last_hidden_state[0]
        head: Any = self.model.lm_head
        return head(hidden.index_select(0, batch.rows), batch.targets, **how)


def _joined(features: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))
