from copy import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speciarl.rollout.cache import GroupCache, assign_slots, rollout_attention

KEY_HEADS, SHARED, SIZE, SCALE = 2, 3, 8, 0.4
QUERY_HEADS = KEY_HEADS * SHARED


class Exact:
    """Attention of one row, key by key, in float64."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [Hkv, l, D] of the row's prompt."""
        self.keys, self.values = keys.double(), values.double()

    def step(self, heads: Tensor) -> Tensor:
        """heads: [Hq + 2 Hkv, D]. Returns [Hq, D]."""
        query, key, value = heads.double().split([QUERY_HEADS, KEY_HEADS, KEY_HEADS])
        self.keys = torch.cat([self.keys, key[:, None]], 1)
        self.values = torch.cat([self.values, value[:, None]], 1)
        out = [
            (SCALE * self.keys[h // SHARED] @ query[h]).softmax(0) @ self.values[h // SHARED]
            for h in range(QUERY_HEADS)
        ]
        return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (2, 9, 4)])
def test_attention_equals_every_row_alone(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows that fork, rows and prompts that go, more tokens than the first block holds."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    keys = normal(3, KEY_HEADS, max(lengths), SIZE)
    values = normal(3, KEY_HEADS, max(lengths), SIZE)
    cache = GroupCache(lengths, limit=70, device=torch.device("cpu"))
    cache.place(0)
    cache.store(0, keys[:2], values[:2])
    cache.place(2)
    cache.store(0, keys[2:, :, : lengths[2]], values[2:, :, : lengths[2]])
    cache.open(QUERY_HEADS, width=5)
    exact = [Exact(keys[p, :, : lengths[p]], values[p, :, : lengths[p]]) for p in range(3)]
    taken = {0: [0, 0, 1, 1, 1, 1, 2], 3: [0, 2, 3, 5, 6], 5: [0, 0, 1, 2, 2, 2, 3, 4, 4],
             66: [2, 3, 7], 68: [0, 2, 2], 69: [1]}  # fmt: skip
    worst = 0.0
    for step in range(70):
        if step in taken:
            cache.select(np.array(taken[step]))
            exact = [copy(exact[i]) for i in taken[step]]
        heads = normal(len(exact), QUERY_HEADS + 2 * KEY_HEADS, SIZE)
        found = cache.attend(0, heads, SCALE).view(len(exact), QUERY_HEADS, SIZE).double()
        cache.advance()
        wanted = torch.stack([row.step(head) for row, head in zip(exact, heads, strict=True)])
        worst = max(worst, float((found - wanted).abs().max()))
    assert worst < {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]


def test_every_row_has_a_slot_of_its_own_prompt() -> None:
    owner = np.array([2, 0, 2, 2, 0])
    slots = assign_slots(owner, prompts=4, heads=2, device=torch.device("cpu"))
    assert slots.width == 3
    flat = slots.slots.view(5, 2)
    assert len(set(flat.flatten().tolist())) == 10
    for row, prompt in enumerate(owner):
        for head in range(2):
            slot = int(flat[row, head])
            assert slot // slots.width == prompt * 2 + head
            assert slots.rows[slot] == row * 2 + head


def test_attention_it_does_not_compute_is_refused() -> None:
    module, x = nn.Module(), torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="belongs to a rollout engine"):
        rollout_attention(module, x, x, x, None, 1.0)
    cache = GroupCache([1], 1, torch.device("cpu"))
    for extra in ({"sliding_window": 8}, {"softcap": 30.0}):
        with pytest.raises(ValueError, match="full causal"):
            rollout_attention(module, x, x, x, None, 1.0, group_cache=cache, **extra)
