"""LoRA adapters: only they train, without them the model is the base, merged they are weights."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from speciarl.core.batch import PackedBatch, pack
from speciarl.core.lora import adapters_off
from speciarl.core.optim import OptimConfig, Optimizer
from speciarl.core.policy import ModelConfig, Policy, whole
from speciarl.core.world import World
from tiny import KINDS, LAYERS, Tiny, perturb, plain_logprobs

LINEAR_LAYERS = LAYERS * 7  # q, k, v, o, gate, up and down


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest, model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs[request.param], pictures)


@pytest.fixture
def policy(tiny: Tiny, world: World) -> Policy:
    config = ModelConfig(path=str(tiny.folder), lora_rank=4, lora_alpha=8.0)
    return Policy(config, world, tiny.banned, reference=True)


@pytest.fixture
def batch(tiny: Tiny, policy: Policy) -> PackedBatch:
    return pack(tiny.items(), policy.image_token_id, policy.world.device)


@torch.no_grad()
def scored(policy: Policy, batch: PackedBatch) -> Tensor:
    return policy.logprobs(batch, temperature=1.0)


@torch.no_grad()
def scored_by(folder: Path, tiny: Tiny) -> Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return plain_logprobs(model, tiny.items(), tiny.banned)


def test_a_new_adapter_changes_nothing(policy: Policy, tiny: Tiny, batch: PackedBatch) -> None:
    wanted = scored_by(tiny.folder, tiny)
    torch.testing.assert_close(scored(policy, batch), wanted, rtol=0, atol=1e-5)


def test_the_first_weights_depend_on_the_seed_alone(
    policy: Policy, tiny: Tiny, world: World
) -> None:
    first = {name: whole(p) for name, p in policy.parameters().items() if ".lora_A." in name}
    for seed, same in ((0, True), (1, False)):
        torch.manual_seed(99)  # whatever the caller's generator is at
        again = Policy(policy.config, world, tiny.banned, reference=True, seed=seed).parameters()
        assert {torch.equal(first[name], whole(again[name])) for name in first} == {same}


def test_every_linear_layer_of_the_language_model_has_one(policy: Policy) -> None:
    names = list(policy.parameters())
    assert len(names) == 2 * LINEAR_LAYERS
    assert all(".language_model." in name and ".lora_" in name for name in names)


def test_without_adapters_the_model_is_the_base(
    policy: Policy, tiny: Tiny, batch: PackedBatch
) -> None:
    base = scored_by(tiny.folder, tiny)
    perturb(policy.parameters())
    moved = scored(policy, batch)
    assert (moved - base).abs().max() > 1e-2
    assert policy.frozen is None  # no second copy of the model
    found = policy.reference_logprobs(batch, temperature=1.0)
    torch.testing.assert_close(found, base, rtol=0, atol=1e-5)
    # They are on again afterwards, after an error too, and still train.
    assert torch.equal(scored(policy, batch), moved)
    with pytest.raises(KeyError), adapters_off(policy.hf):
        raise KeyError
    assert torch.equal(scored(policy, batch), moved)
    assert len(policy.parameters()) == 2 * LINEAR_LAYERS


def test_only_adapters_train(policy: Policy, batch: PackedBatch) -> None:
    perturb(policy.parameters())
    before = {name: whole(p.detach()).clone() for name, p in policy.hf.named_parameters()}
    optimizer = Optimizer(OptimConfig(lr=0.01), policy.parameters())
    policy.logprobs(batch, temperature=1.0).sum().backward()
    with_gradient = {name for name, p in policy.hf.named_parameters() if p.grad is not None}
    norm, skipped = optimizer.step(0.01)
    assert norm > 0 and not skipped
    after = {name: whole(p.detach()) for name, p in policy.hf.named_parameters()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert with_gradient == changed == set(policy.parameters())


def test_merged_weights_are_the_adapted_model(
    policy: Policy, tiny: Tiny, batch: PackedBatch
) -> None:
    perturb(policy.parameters())
    model = tiny.model()
    weights = dict(policy.named_weights())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert weights.keys() == model.state_dict().keys() - tied
    loaded = model.load_state_dict(weights, strict=False)
    assert set(loaded.missing_keys) == tied and not loaded.unexpected_keys
    with torch.no_grad():
        wanted = plain_logprobs(model, tiny.items(), tiny.banned)
    torch.testing.assert_close(scored(policy, batch), wanted, rtol=0, atol=1e-5)


def test_the_saved_model_is_merged(
    policy: Policy, tiny: Tiny, batch: PackedBatch, tmp_path: Path
) -> None:
    perturb(policy.parameters())
    policy.save_hf(tmp_path)
    wanted = scored(policy, batch)
    assert (wanted - scored_by(tiny.folder, tiny)).abs().max() > 1e-2
    torch.testing.assert_close(scored_by(tmp_path, tiny), wanted, rtol=0, atol=1e-5)


def test_bfloat16_base_with_float32_adapters(tiny: Tiny, world: World) -> None:
    config = ModelConfig(path=str(tiny.folder), lora_rank=4, dtype="bfloat16")
    policy = Policy(config, world, tiny.banned, reference=True)
    held = {n: p.dtype for n, p in policy.hf.named_parameters()}
    assert all(held[name] is torch.float32 for name in policy.parameters())
    assert {held[name] for name in held.keys() - policy.parameters()} == {torch.bfloat16}
    batch = pack(tiny.items(), policy.image_token_id, world.device)
    policy.logprobs(batch, temperature=1.0).sum().backward()
    assert {p.grad.dtype for p in policy.parameters().values()} == {torch.float32}
    found = scored(policy, batch)
    assert (found - scored_by(tiny.folder, tiny)).abs().mean() < 0.05


def test_without_peft_the_error_says_what_to_install(
    tiny: Tiny, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    config = ModelConfig(path=str(tiny.folder), lora_rank=4)
    with pytest.raises(ImportError, match=r"speciarl\[lora\]"):
        Policy(config, world, tiny.banned, reference=False)
