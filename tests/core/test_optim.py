"""The optimizer against torch's own on plain tensors, its refusals, and the schedule."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from speciarl.core.optim import OptimConfig, Optimizer, global_norm, learning_rate
from speciarl.core.policy import whole
from speciarl.core.world import World

SHAPES = {"matrix": (7, 5), "kernel": (3, 2, 2), "bias": (5,), "scalar": ()}


def some_tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def sharded(tensors: dict[str, Tensor], world: World) -> dict[str, nn.Parameter]:
    """DTensors over the world's mesh; the scalar, which cannot be cut, stays plain."""
    return {
        name: nn.Parameter(distribute_tensor(x, world.mesh, [Shard(0)]) if x.ndim else x.clone())
        for name, x in tensors.items()
    }


def give(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor], world: World) -> None:
    for name, parameter in parameters.items():
        gradient = gradients[name].clone()
        parameter.grad = (
            distribute_tensor(gradient, world.mesh, [Shard(0)]) if gradient.ndim else gradient
        )


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_steps_equal_torch_adamw_on_plain_tensors(world: World, clip: float) -> None:
    config = OptimConfig(betas=(0.8, 0.95), weight_decay=0.1, grad_clip=clip, eps=1e-6)
    ours = sharded(some_tensors(0), world)
    plain = {name: nn.Parameter(value.clone()) for name, value in some_tensors(0).items()}
    optimizer = Optimizer(config, ours)
    reference = torch.optim.AdamW(
        [
            {"params": [plain["matrix"], plain["kernel"]], "weight_decay": 0.1},
            {"params": [plain["bias"], plain["scalar"]], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for step in range(5):
        gradients = some_tensors(step + 1, scale=10.0 ** (step - 2))
        give(ours, gradients, world)
        for name, parameter in plain.items():
            parameter.grad = gradients[name].clone()
        before = torch.nn.utils.clip_grad_norm_(plain.values(), clip or 1e30)
        lr = 0.01 * (step + 1)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        norm, skipped = optimizer.step(lr)
        assert norm.item() == pytest.approx(before.item(), rel=1e-6)
        assert skipped.item() == 0.0
        assert all(parameter.grad is None for parameter in ours.values())
        for name, parameter in plain.items():
            torch.testing.assert_close(whole(ours[name]).detach(), parameter.detach())


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_leaves_everything_as_it_was(
    world: World, poison: float, clip: float
) -> None:
    config = OptimConfig(grad_clip=clip)
    ours, undisturbed = sharded(some_tensors(0), world), sharded(some_tensors(0), world)
    optimizer, other = Optimizer(config, ours), Optimizer(config, undisturbed)
    for parameters, which in ((ours, optimizer), (undisturbed, other)):
        give(parameters, some_tensors(1), world)
        which.step(0.01)
    kept = {name: whole(value).clone() for name, value in optimizer.tensors().items()}
    weights = {name: whole(value.detach()).clone() for name, value in ours.items()}

    bad = some_tensors(2)
    bad["bias"][3] = poison
    give(ours, bad, world)
    norm, skipped = optimizer.step(0.01)

    assert skipped.item() == 1.0 and not math.isfinite(norm.item())
    for name, value in optimizer.tensors().items():
        assert torch.equal(whole(value), kept[name]), name
    for name, parameter in ours.items():
        assert torch.equal(whole(parameter.detach()), weights[name]), name
    # The next good step is as if the bad one had never been.
    for parameters, which in ((ours, optimizer), (undisturbed, other)):
        give(parameters, some_tensors(3), world)
        assert which.step(0.01)[1].item() == 0.0
    for name, parameter in ours.items():
        assert torch.equal(whole(parameter.detach()), whole(undisturbed[name].detach())), name


def test_a_parameter_without_gradient_stays(world: World) -> None:
    parameters = sharded(some_tensors(0), world)
    gradients = some_tensors(1)
    give(parameters, gradients, world)
    parameters["kernel"].grad = None
    norm, _ = Optimizer(OptimConfig(lr=0.1), parameters).step(0.1)
    wanted = sum(g.square().sum() for name, g in gradients.items() if name != "kernel").sqrt()
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(whole(parameters["kernel"].detach()), some_tensors(0)["kernel"])
    assert not torch.equal(whole(parameters["matrix"].detach()), some_tensors(0)["matrix"])


def test_state_is_there_from_the_start_and_named(world: World) -> None:
    tensors = Optimizer(OptimConfig(), sharded(some_tensors(0), world)).tensors()
    assert set(tensors) == {
        f"optimizer.{name}.{key}" for name in SHAPES for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert all(not whole(value).any() for value in tensors.values())
    assert tensors["optimizer.matrix.exp_avg"].shape == SHAPES["matrix"]


def test_no_gradient_at_all_has_norm_zero(world: World) -> None:
    assert global_norm(list(sharded(some_tensors(0), world).values())).item() == 0.0


def test_constant_schedule_with_warmup() -> None:
    config = OptimConfig(lr=8e-4, warmup=4)
    rates = [learning_rate(config, update, 10) for update in range(10)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4] + [8e-4] * 6)


def test_cosine_schedule_ends_at_a_tenth_of_the_peak() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup=2)
    rates = [learning_rate(config, update, 11) for update in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.55)  # half way from the peak to its tenth
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    # A run that goes on beyond its planned end stays there; one of a single update has its peak.
    assert learning_rate(config, 30, 11) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0, schedule="cosine"), 0, 1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "linear"}, "'linear'.*constant, cosine"),
        ({"lr": 0.0}, "lr"),
        ({"eps": 0.0}, "eps"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"warmup": -1}, "warmup"),
        ({"max_nonfinite": 0}, "max_nonfinite"),
    ],
)
def test_impossible_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)
