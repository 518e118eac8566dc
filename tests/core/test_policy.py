"""The sharded policy computes, trains and saves what transformers' own model would."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from speciarl.core.batch import PackedBatch, pack
from speciarl.core.policy import ModelConfig, Policy, whole
from speciarl.core.prompts import PromptBuilder
from speciarl.core.world import World
from speciarl.kernels.loss import LossSpec
from tiny import KINDS, Tiny, apart, perturb, plain_logprobs

VISION = "model.visual."


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest, model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs[request.param], pictures)


@pytest.fixture
def toy(model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs["toy"], pictures)


def policy_of(tiny: Tiny, world: World, *, reference: bool = False, **settings: object) -> Policy:
    config = replace(ModelConfig(path=str(tiny.folder)), **settings)  # type: ignore[arg-type]
    return Policy(config, world, tiny.banned, reference=reference)


def batch_of(tiny: Tiny, policy: Policy) -> PackedBatch:
    return pack(tiny.items(), policy.image_token_id, policy.world.device)


def upstream(tiny: Tiny) -> Tensor:
    return torch.linspace(-1, 2, sum(len(item.ids) for item in tiny.items()))


def gradient(tiny: Tiny, policy: Policy) -> dict[str, Tensor]:
    scores = policy.logprobs(batch_of(tiny, policy), temperature=0.8)
    (scores * upstream(tiny)).sum().backward()
    return {name: whole(p.grad) for name, p in policy.parameters().items() if p.grad is not None}


def plain_gradient(tiny: Tiny, dtype: torch.dtype) -> dict[str, Tensor]:
    model = tiny.model(dtype)
    (plain_logprobs(model, tiny.items(), tiny.banned, 0.8) * upstream(tiny)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def scored_by(folder: Path, tiny: Tiny) -> Tensor:
    """Log-probs under the checkpoint in a folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return plain_logprobs(model, tiny.items(), tiny.banned)


@torch.no_grad()
def scored(tiny: Tiny, policy: Policy) -> Tensor:
    return policy.logprobs(batch_of(tiny, policy), temperature=1.0)


def test_the_gradient_is_plain_autograds(tiny: Tiny, world: World) -> None:
    found = gradient(tiny, policy_of(tiny, world))
    assert max(apart(found, plain_gradient(tiny, torch.float64)).values()) < 1e-5


def test_ways_of_holding_the_model_do_not_change_the_gradient(toy: Tiny, world: World) -> None:
    wanted = gradient(toy, policy_of(toy, world))
    for settings in (
        {"checkpoint_activations": True},
        {"reshard_after_forward": False},
        {"cpu_offload": True},
        {"head_chunk": 3},
        {"head_mode": "store"},
        {"head_mode": "recompute", "head_chunk": 3},
        {"head_mode": "chunked"},
    ):
        found = gradient(toy, policy_of(toy, world, **settings))
        assert max(apart(found, wanted).values()) < 1e-5, settings


def loss_gradient(
    tiny: Tiny, policy: Policy, moved: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, statistics and gradient of a policy loss over the batch's seven sequences."""
    batch = batch_of(tiny, policy)
    far = torch.linspace(-7, -5, len(batch.targets))
    loss, stats = policy.loss(
        batch,
        temperature=0.8,
        spec=LossSpec(entropy_coef=0.01),
        advantages=torch.linspace(-1, 1, 7),
        weights=torch.linspace(0.1, 0.3, 7),
        old=far if moved else None,
        ref=far - 0.1,
        engine=far + 0.1,
    )
    loss.backward()
    grads = {name: whole(p.grad) for name, p in policy.parameters().items() if p.grad is not None}
    return loss.detach(), stats, grads


@pytest.mark.parametrize("moved", [False, True])
def test_a_loss_computed_in_the_head_is_the_same(
    toy: Tiny, world: World, moved: bool, recwarn: pytest.WarningsRecorder
) -> None:
    wanted = loss_gradient(toy, policy_of(toy, world), moved)
    how = {"head_mode": "chunked", "head_chunk": 4}
    found = loss_gradient(toy, policy_of(toy, world, **how), moved)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-5, atol=1e-5)
    assert max(apart(found[2], wanted[2]).values()) < 1e-5
    assert not [w for w in recwarn if "view" in str(w.message)]  # FSDP's


@pytest.mark.parametrize("mode", ["store", "recompute", "chunked"])
@pytest.mark.parametrize("route", ["rows", "expsum"])
@pytest.mark.parametrize("kind", ["toy", "tied"])
def test_a_heads_kernels_agree_with_the_reference(
    kind: str,
    route: str,
    mode: str,
    model_dirs: dict[str, Path],
    pictures: Path,
    world: World,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """In bf16, as on a GPU. Tokens of both signs cancel, which leaves more of the rounding."""
    pytest.importorskip("triton")
    tiny = Tiny(model_dirs[kind], pictures)
    wanted = loss_gradient(tiny, policy_of(tiny, world, dtype="bfloat16"), True)
    how = {"head_route": route, "head_mode": mode, "head_chunk": 16}
    policy = policy_of(tiny, world, dtype="bfloat16", **how)
    assert policy.head_route == route
    found = loss_gradient(tiny, policy, True)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=0)
    assert max(apart(found[2], wanted[2]).values()) < 0.05
    assert not [w for w in recwarn if "view" in str(w.message)]  # FSDP's


def test_a_head_route_that_cannot_run_is_named(toy: Tiny, world: World) -> None:
    with pytest.raises(ValueError, match="'expsum' cannot run here.*bf16.*model.head_route=auto"):
        policy_of(toy, world, head_route="expsum")


def test_checkpointing_recomputes_instead_of_keeping(toy: Tiny, world: World) -> None:
    def kept(**settings: object) -> int:
        policy = policy_of(toy, world, **settings)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            policy.logprobs(batch_of(toy, policy), temperature=1.0)
        return sum(sizes)

    assert kept(checkpoint_activations=True) < 0.5 * kept()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_frozen_vision_tower_is_not_differentiated(
    tiny: Tiny, world: World, checkpoint: bool
) -> None:
    policy = policy_of(tiny, world, freeze_vision=True, checkpoint_activations=checkpoint)
    assert not any(name.startswith(VISION) for name in policy.parameters())
    differentiated = []
    policy.hf.model.visual.register_forward_hook(
        lambda module, inputs, out: differentiated.append(out.last_hidden_state.requires_grad)
    )
    found = gradient(tiny, policy)
    assert differentiated == [False]
    assert all(p.grad is None for n, p in policy.hf.named_parameters() if n.startswith(VISION))
    wanted = plain_gradient(tiny, torch.float32)
    wanted = {name: value for name, value in wanted.items() if not name.startswith(VISION)}
    assert max(apart(found, wanted).values()) < 1e-5


def test_weights_have_transformers_names_and_values(tiny: Tiny, world: World) -> None:
    policy = policy_of(tiny, world)
    wanted = tiny.model().state_dict()
    weights = dict(policy.named_weights())
    tied = {"lm_head.weight"} if policy.hf.config.tie_word_embeddings else set()
    assert weights.keys() == wanted.keys() - tied
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)
    assert len(list(policy.named_weights())) == len(weights)


def test_weights_are_those_of_the_last_update(toy: Tiny, world: World) -> None:
    policy = policy_of(toy, world, reshard_after_forward=False)
    perturb(policy.parameters())
    before = {name: value.clone() for name, value in policy.named_weights()}
    scored(toy, policy)  # leaves gathered copies behind
    gradient(toy, policy)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.sub_(0.1 * parameter.grad)
    after = dict(policy.named_weights())
    assert any(not torch.equal(after[name], before[name]) for name in after)
    model = toy.model()
    model.load_state_dict(after)
    with torch.no_grad():
        wanted = plain_logprobs(model, toy.items(), toy.banned)
    torch.testing.assert_close(scored(toy, policy), wanted, rtol=0, atol=1e-5)


def test_the_saved_model_loads_and_scores_the_same(
    tiny: Tiny, world: World, tmp_path: Path
) -> None:
    policy = policy_of(tiny, world)
    perturb(policy.parameters())
    policy.save_hf(tmp_path)
    tiny.builder.save(tmp_path)
    wanted = scored(tiny, policy)
    assert (wanted - scored_by(tiny.folder, tiny)).abs().max() > 1e-2
    torch.testing.assert_close(scored_by(tmp_path, tiny), wanted, rtol=0, atol=1e-5)
    again = PromptBuilder(tmp_path)
    assert again.stop_ids == tiny.builder.stop_ids and len(again.stop_ids) == 2
    assert again.banned_ids == tiny.builder.banned_ids


def test_the_reference_stays_where_the_policy_began(toy: Tiny, world: World) -> None:
    policy = policy_of(toy, world, reference=True)
    assert policy.frozen is not None
    assert not any(p.requires_grad for p in policy.frozen.parameters())
    batch = batch_of(toy, policy)
    began = scored(toy, policy)
    perturb(policy.parameters())
    found = policy.reference_logprobs(batch, temperature=1.0)
    assert not found.requires_grad
    torch.testing.assert_close(found, began, rtol=0, atol=1e-6)
    assert (scored(toy, policy) - began).abs().max() > 1e-2


def test_a_policy_without_reference_says_so(toy: Tiny, world: World) -> None:
    policy = policy_of(toy, world)
    with pytest.raises(RuntimeError, match="reference=True"):
        policy.reference_logprobs(batch_of(toy, policy), temperature=1.0)


def test_bfloat16_keeps_the_vision_towers_bits(tiny: Tiny, world: World) -> None:
    """The engine runs transformers' tower unsharded; rounding must not depend on sharding."""
    policy = policy_of(tiny, world, dtype="bfloat16")
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}
    assert {w.dtype for _, w in policy.named_weights()} == {torch.bfloat16}
    features = []
    policy.hf.model.visual.register_forward_hook(
        lambda module, inputs, out: features.append(joined(out.pooler_output).detach())
    )
    found = gradient(tiny, policy)
    assert {value.dtype for value in found.values()} == {torch.float32}
    model = tiny.model(torch.bfloat16)
    with torch.no_grad():
        vision = model.model.get_image_features(**batch_of(tiny, policy).images, return_dict=True)
    assert torch.equal(features[0], joined(vision.pooler_output))


def joined(features: Tensor | tuple[Tensor, ...]) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(features)


def test_the_compute_type() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ModelConfig().compute_dtype(cpu) is torch.float32
    assert ModelConfig().compute_dtype(cuda) is torch.bfloat16
    assert ModelConfig(dtype="float32").compute_dtype(cuda) is torch.float32
    assert ModelConfig(dtype="bfloat16").compute_dtype(cpu) is torch.bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float16"}, "'float16'.*auto, float32, bfloat16"),
        ({"attention": "eager"}, "'eager'.*sdpa"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"head_chunk": -1}, "head_chunk"),
        ({"head_route": "fast"}, "head_route='fast'.*reference, rows, expsum"),
        ({"head_mode": "kept"}, "head_mode='kept'.*store, recompute, chunked"),
    ],
)
def test_impossible_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


def test_a_missing_checkpoint_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Policy(ModelConfig(path=str(tmp_path / "nowhere")), world, (), reference=False)
