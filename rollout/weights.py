"""Strict copy of pushed weights into a model, in place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from speciarl.rollout.engine import WeightsRefused


@torch.no_grad()
def copy_weights(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every parameter of `model`, cast to its dtype and device.

    Names are those of `model.state_dict()`. Of the names of one tied parameter one is enough;
    persistent buffers may come too. The tensors may be produced while this runs.

    Raises WeightsRefused for an unknown name, a name that comes twice, another shape, or a
    parameter that did not come. Then part of the model may already hold new values.
    """
    state = model.state_dict(keep_vars=True)
    seen: set[str] = set()
    for name, tensor in named_tensors:
        if name not in state:
            near = difflib.get_close_matches(name, state, 1)
            hint = f"; the nearest known name is {near[0]}" if near else ""
            raise WeightsRefused(f"unknown weight {name}{hint}")
        if name in seen:
            raise WeightsRefused(f"weight {name} came twice")
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model has {tuple(state[name].shape)}"
            raise WeightsRefused(f"weight {name} has shape {shapes}")
        state[name].copy_(tensor)
        seen.add(name)
    arrived = {id(state[name]) for name in seen}
    missing = [
        name
        for name, target in state.items()
        if isinstance(target, nn.Parameter) and id(target) not in arrived
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsRefused(f"weight {missing[0]}{more} did not come")
