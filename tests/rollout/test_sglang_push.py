"""What of a push needs no engine: names, buckets, and which weights must come."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from speciarl.rollout.engine import WeightsRefused
from speciarl.rollout.sglang_push import buckets, checkpoint_name, manifest_of
from tiny import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_checkpoints(kind: str, model_dirs: dict[str, Path]) -> None:
    folder = model_dirs[kind]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        stored = set(file.keys())
    named = dict(model.named_parameters())
    sent = {checkpoint_name(name) for name in named}
    assert len(sent) == len(named)
    # Qwen3-VL's checkpoints have longer names; SGLang shortens them as it does Qwen2.5-VL's.
    assert sent == (set(map(checkpoint_name, stored)) if kind == "qwen3" else stored)
    manifest = manifest_of(folder)
    assert [name for name, _ in manifest.checked(named.items())] == list(named)
    with pytest.raises(WeightsRefused, match="did not come"):
        list(manifest.checked(list(named.items())[1:]))


def test_other_models_keep_their_names() -> None:
    assert checkpoint_name("lm_head.weight") == "lm_head.weight"
    assert checkpoint_name("model.layers.0.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert checkpoint_name("other.model.visual.x") == "other.model.visual.x"


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_buckets_hold_everything_once_in_order(sizes: list[int], limit: int) -> None:
    named = [(str(i), torch.empty(size)) for i, size in enumerate(sizes)]
    found = list(buckets(named, limit))
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in named]
    for bucket in found:
        assert bucket
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= limit
    for bucket, later in zip(found, found[1:], strict=False):
        assert sum(t.nbytes for _, t in bucket) + later[0][1].nbytes > limit  # no bucket too soon


def test_tensors_are_made_one_bucket_ahead_at_most() -> None:
    made: list[int] = []

    def produce() -> object:
        for i in range(12):
            made.append(i)
            yield str(i), torch.empty(10)

    for done, _ in enumerate(buckets(produce(), 120), start=1):  # type: ignore[arg-type]
        assert len(made) <= 3 * done + 1
