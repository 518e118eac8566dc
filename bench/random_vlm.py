"""Qwen2.5-VL of the released sizes with random weights: nothing to download, nothing to learn.

Tokenizer and image processor are the toy model's, so token ids above its 423 decode to nothing
and a completion only ends at its length limit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from speciarl.core.toymodel import MERGE, PATCH, save_toymodel, toy_config, toy_tokenizer

_VISION = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=PATCH,
    spatial_merge_size=MERGE, temporal_patch_size=2, window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)  # fmt: skip
# The released checkpoints' config.json.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-3b": dict(
        text=dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2,
        ),
        vision=dict(_VISION, out_hidden_size=2048),
        tied=True,
    ),
    "qwen2.5-vl-7b": dict(
        text=dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4,
        ),
        vision=dict(_VISION, out_hidden_size=3584),
        tied=False,
    ),
    # For machines without a GPU: the toy model's sizes and the real vocabulary's order.
    "tiny": dict(
        text=dict(
            vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        ),
        vision=dict(
            _VISION, depth=2, hidden_size=64, intermediate_size=128, num_heads=2,
            fullatt_block_indexes=[1], out_hidden_size=128,
        ),
        tied=True,
    ),
}  # fmt: skip


def random_config(size: str) -> Qwen2_5_VLConfig:
    """The configuration of a size in `SIZES`, with the toy tokenizer's special ids.

    Raises:
        ValueError: an unknown size; the message lists the known ones.
    """
    if size not in SIZES:
        raise ValueError(f"model size {size!r}: one of {', '.join(SIZES)}")
    wanted = SIZES[size]
    toy: Any = toy_config(toy_tokenizer())
    half = wanted["text"]["hidden_size"] // wanted["text"]["num_attention_heads"] // 2
    text = dict(
        wanted["text"], max_position_embeddings=128000, rms_norm_eps=1e-6,
        # [16, 24, 24] for the released head width of 128.
        rope_parameters=dict(
            rope_type="default", rope_theta=1e6,
            mrope_section=[half // 4, half * 3 // 8, half * 3 // 8],
        ),
        bos_token_id=None, eos_token_id=toy.text_config.eos_token_id,
        pad_token_id=toy.text_config.pad_token_id,
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=dict(wanted["vision"]),
        tie_word_embeddings=wanted["tied"], image_token_id=toy.image_token_id,
        video_token_id=toy.video_token_id, vision_start_token_id=toy.vision_start_token_id,
        vision_end_token_id=toy.vision_end_token_id,
    )  # fmt: skip


def save_random(folder: Path, size: str, image_tokens: int, device: torch.device) -> Path:
    """Writes a checkpoint of random weights (bf16 on CUDA, else fp32); returns `folder`.

    Args:
        image_tokens: every image is enlarged to at least this many tokens, at most half as many
            more.
    """
    save_toymodel(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(random_config(size), dtype=dtype)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.save_pretrained(folder, max_shard_size="4GB")
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text())
    cell = (PATCH * MERGE) ** 2
    most = image_tokens * 3 // 2
    processor["size"] = {"shortest_edge": image_tokens * cell, "longest_edge": most * cell}
    file.write_text(json.dumps(processor, indent=1) + "\n")
    return folder
