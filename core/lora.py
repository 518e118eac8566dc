"""LoRA adapters through peft, injected in place: names and classes stay transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def add_lora(model: Any, rank: int, alpha: float, seed: int) -> None:
    """Adapters on every linear layer of the language model; all else is frozen.

    Their first weights are drawn from `seed` alone, so that ranks agree on them.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("model.lora_rank needs peft: pip install 'speciarl[lora]'") from error
    text = model.model.language_model
    prefix = next(name for name, module in model.named_modules() if module is text)
    targets = [f"{prefix}.{n}" for n, m in text.named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapters: the frozen reference, at no memory.

    peft's own switch also flips requires_grad, which must not change under FSDP.
    """
    layers = _layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
