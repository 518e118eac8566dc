"""Model FLOPs of a training step, and what share of a device's peak they are.

A token through a matrix of n weights costs 2 n FLOPs forward, 2 n for the gradient of its input
and 2 n for the gradient of the weights. So of N weights, T tokens cost

    6 N T   where the weights are trained,
    4 N T   where they are frozen but gradient passes through (the base weights under LoRA),
    2 N T   where there is no gradient (reference, old log-probs, a frozen vision tower).

N is the language model without its embedding table for row tokens, the output layer for predicted
tokens, the vision tower for image patches (its merger sees a quarter as many). Attention scores,
adapters, and what activation checkpointing computes twice are not counted: this is model FLOPs
utilisation (PaLM, appendix B), not the hardware's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Dense bf16 FLOP/s of NVIDIA's data sheets; the first name found in the device's name counts.
PEAKS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


def peak_of(device_name: str) -> float | None:
    """bf16 FLOP/s of a CUDA device by name; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class ModelSize:
    """Weights that multiply: per row token, predicted token, patch, and merged patch."""

    language: int
    head: int
    vision: int
    merger: int
    merged: int = 4
    """Patches that become one token."""

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Of a transformers Qwen-VL model; LoRA adapters are not counted."""

        def count(module: Any) -> int:
            named = module.named_parameters()
            return sum(p.numel() for name, p in named if ".lora_" not in name)

        inner = model.model
        text, merger = inner.language_model, count(inner.visual.merger)
        return cls(
            language=count(text) - text.get_input_embeddings().weight.numel(),
            head=model.lm_head.weight.numel(),
            vision=count(inner.visual) - merger,
            merger=merger,
            merged=int(model.config.vision_config.spatial_merge_size) ** 2,
        )

    def forward(self, tokens: int, predicted: int, patches: int) -> tuple[float, float]:
        """FLOPs of a forward pass: (language model and head, vision tower)."""
        text = 2.0 * (self.language * tokens + self.head * predicted)
        return text, 2.0 * (self.vision * patches + self.merger * patches / self.merged)


def learn_flops(
    size: ModelSize, work: Mapping[str, int], *, lora: bool, freeze_vision: bool
) -> float:
    """FLOPs of one rank's learning in a step.

    Args:
        work: "language, learn", "vision, learn" and the same for "reference" as `StepRecord`
            counts them, and "predicted": completion tokens learnt from.
    """
    predicted = work.get("predicted", 0)
    text, vision = size.forward(work.get("language, learn", 0), predicted, 0)
    _, vision = size.forward(0, 0, work.get("vision, learn", 0))
    total = text * (2 if lora else 3) + vision * (1 if lora or freeze_vision else 3)
    scored = work.get("language, reference", 0)
    if scored:
        total += sum(size.forward(scored, predicted, work.get("vision, reference", 0)))
    return total
