"""A push of weights, checked strictly: each weight of the model once, in its shape."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from speciarl.rollout.engine import WeightsRefused


class Manifest:
    """Which weights a model has: names of its `state_dict()`, shapes, which ones are tied.

    Args:
        model: on any device, "meta" too.
    """

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._same = {name: id(tensor) for name, tensor in state.items()}
        self._needed = {
            name: id(tensor) for name, tensor in state.items() if isinstance(tensor, nn.Parameter)
        }

    def checked(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same pairs, one after another, as they are produced.

        Of the names of one tied parameter one is enough; persistent buffers may come too. Raises
        WeightsRefused for an unknown name, a name that comes twice, another shape, or, at the end,
        a parameter that did not come.
        """
        seen: set[str] = set()
        for name, tensor in named_tensors:
            if name not in self._shapes:
                near = difflib.get_close_matches(name, self._shapes, 1)
                hint = f"; the nearest known name is {near[0]}" if near else ""
                raise WeightsRefused(f"unknown weight {name}{hint}")
            if name in seen:
                raise WeightsRefused(f"weight {name} came twice")
            if tensor.shape != self._shapes[name]:
                shapes = f"{tuple(tensor.shape)}, the model has {tuple(self._shapes[name])}"
                raise WeightsRefused(f"weight {name} has shape {shapes}")
            seen.add(name)
            yield name, tensor
        arrived = {self._same[name] for name in seen}
        missing = [name for name, same in self._needed.items() if same not in arrived]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise WeightsRefused(f"weight {missing[0]}{more} did not come")


@torch.no_grad()
def copy_weights(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every parameter of `model`, cast to its dtype and device, as the tensors are produced.

    Raises WeightsRefused as `Manifest.checked` does. Then part of the model may already hold new
    values.
    """
    state = model.state_dict(keep_vars=True)
    for name, tensor in Manifest(model).checked(named_tensors):
        state[name].copy_(tensor)
