"""AdamW over sharded parameters, its schedule, and steps that refuse non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and the sizes of an update."""

    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 is no clipping."""
    schedule: str = "constant"
    """"constant" or "cosine" (down to a tenth of the peak at the last update)."""
    warmup: int = 0
    """Updates of linear warm-up."""
    max_nonfinite: int = 5
    """Non-finite updates in a row before the run stops and saves its inputs."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule={self.schedule!r}: one of constant, cosine")
        numbers = (self.lr, self.eps, self.grad_clip, self.weight_decay)
        if min(self.lr, self.eps) <= 0 or min(numbers) < 0 or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"lr={self.lr}, eps={self.eps}, grad_clip={self.grad_clip}, weight_decay="
                f"{self.weight_decay}: finite, lr and eps positive, the others not negative"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: two numbers in [0, 1)")
        if self.warmup < 0 or self.max_nonfinite < 1:
            raise ValueError("warmup must not be negative, max_nonfinite at least 1")


def learning_rate(config: OptimConfig, update: int, total: int) -> float:
    """The rate of update `update` (from 0) of `total`."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (update - config.warmup) / max(1, total - 1 - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


class Optimizer:
    """AdamW that clips, and skips a non-finite gradient without the host knowing."""

    def __init__(self, config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config = config
        self.named = dict(parameters)
        decayed = [p for p in self.named.values() if p.ndim >= 2]
        rest = [p for p in self.named.values() if p.ndim < 2]
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            fused=True,
        )
        self._make_state()

    def _make_state(self) -> None:
        """Creates the moments now, so that a checkpoint can be loaded into them."""
        for parameter in self.named.values():
            self.adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=_local(parameter).device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """One update from the accumulated gradients, which are then dropped.

        Returns:
            (gradient norm before clipping, 1.0 if the update was skipped else 0.0), on the
            device; reading them here would make the host wait.
        """
        norm = global_norm(list(self.named.values()))
        bad = (~torch.isfinite(norm)).float()
        if self.config.grad_clip:
            scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.named.values():
                if parameter.grad is not None:
                    _local(parameter.grad).mul_(scale)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.found_inf = bad  # type: ignore[attr-defined]  # the fused step honours it
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm, bad

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter name, for a checkpoint."""
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.named.items()
            for key, value in self.adam.state[parameter].items()
        }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """L2 norm of the whole gradient, over all shards (collective), on the device."""
    local = [_local(p.grad) for p in parameters if p.grad is not None]
    if not local:
        return torch.zeros(())
    square = torch.stack([g.float().pow(2).sum() for g in local]).sum()
    first = next(p.grad for p in parameters if p.grad is not None)
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        if mesh.size() == 1:
            return square.sqrt()
        if square.device.type != mesh.device_type:
            square = square.to(mesh.device_type)
        torch.distributed.all_reduce(square, group=mesh.get_group())
    return square.sqrt().to(local[0].device)
