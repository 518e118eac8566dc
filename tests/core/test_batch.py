"""A packed row scores every completion as transformers' own unpacked forward does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speciarl.core.attention import choose_route, packed_attention
from speciarl.core.batch import Item, PackedBatch, pack
from speciarl.core.packing import packing
from speciarl.core.policy import ModelConfig, Policy, whole
from speciarl.core.world import World
from speciarl.rollout.engine import Prompt
from tiny import KINDS, Tiny, apart, plain_logprobs, plain_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs[request.param], pictures)


@pytest.fixture(scope="module")
def policy(tiny: Tiny, world: World) -> Policy:
    return Policy(ModelConfig(path=str(tiny.folder)), world, tiny.banned, reference=False)


@pytest.fixture(autouse=True)
def no_gradients_left(policy: Policy) -> Iterator[None]:
    yield
    policy.net.zero_grad(set_to_none=True)


def packed(policy: Policy, items: list[Item]) -> PackedBatch:
    return pack(items, policy.image_token_id, policy.world.device)


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: whole(p.grad) for name, p in policy.parameters().items() if p.grad is not None}
    policy.net.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_unpacked(policy: Policy, tiny: Tiny, temperature: float) -> None:
    items = tiny.items()
    with torch.no_grad():
        found, entropy = policy.logprobs(
            packed(policy, items), temperature=temperature, entropy=True
        )
        model = tiny.model()
        wanted = plain_logprobs(model, items, tiny.banned, temperature)
        table = torch.cat([plain_table(model, i, tiny.banned, temperature) for i in items])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, torch.special.entr(table.exp()).sum(1), rtol=0, atol=1e-5)


def test_the_gradient_of_a_row_is_the_sum_of_its_sequences(policy: Policy, tiny: Tiny) -> None:
    items = tiny.items()
    draw = torch.Generator().manual_seed(0)
    upstream = [torch.randn(len(item.ids), generator=draw) for item in items]
    (policy.logprobs(packed(policy, items), temperature=1.0) * torch.cat(upstream)).sum().backward()
    together = gradients(policy)
    for item, weight in zip(items, upstream, strict=True):
        (policy.logprobs(packed(policy, [item]), temperature=1.0) * weight).sum().backward()
    assert max(apart(together, gradients(policy)).values()) < 1e-5


def test_order_and_company_change_nothing(policy: Policy, tiny: Tiny) -> None:
    items = tiny.items()
    sizes = [len(item.ids) for item in items]
    with torch.no_grad():
        first = policy.logprobs(packed(policy, items), temperature=1.0).split(sizes)
        back = policy.logprobs(packed(policy, items[::-1]), temperature=1.0).split(sizes[::-1])
        # The neighbours' completions and pictures are others now; items 1 and 4 are not.
        strangers = tiny.items(seed=9)[::-1]
        strangers[1], strangers[4] = items[1], items[4]
        lengths = [len(item.ids) for item in strangers]
        mixed = policy.logprobs(packed(policy, strangers), temperature=1.0).split(lengths)
    for one, other in zip(first, reversed(back), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for i in (1, 4):
        torch.testing.assert_close(first[i], mixed[i], rtol=0, atol=1e-5)


def test_a_wrong_position_or_image_would_show(policy: Policy, tiny: Tiny) -> None:
    """What the other tests rest on: these models do depend on M-RoPE and on the pixels."""
    batch = packed(policy, tiny.items())
    flat = batch.positions[:1].expand(4, -1, -1)
    blank = batch.images | {"pixel_values": torch.zeros_like(batch.images["pixel_values"])}
    swapped = batch.feature_of.flip(0)
    with torch.no_grad():
        right = policy.logprobs(batch, temperature=1.0)
        for wrong in (
            replace(batch, positions=flat),
            replace(batch, images=blank),
            replace(batch, feature_of=swapped),
        ):
            off = policy.logprobs(wrong, temperature=1.0) - right
            assert off.abs().max() > 1e-2


def test_completions_of_a_prompt_share_its_image(policy: Policy, tiny: Tiny) -> None:
    items = tiny.items()
    batch = packed(policy, items)
    assert len(batch.images["image_grid_thw"]) == 5  # seven items, five distinct prompts
    assert len({tuple(grid) for grid in batch.images["image_grid_thw"].tolist()}) == 4
    patches = sum(len(p.images["pixel_values"]) for p in {item.prompt for item in items})
    assert len(batch.images["pixel_values"]) == patches
    # The first two are neighbours and share the prompt itself; the last comes again later.
    shown = [item.prompt for item in (items[0], *items[2:])]
    counts = [int((prompt.input_ids == policy.image_token_id).sum()) for prompt in shown]
    features = batch.feature_of.split(counts)
    assert torch.equal(features[0], features[-1])
    assert features[1].min() == counts[0]


def test_the_tensors_of_a_row_by_hand() -> None:
    image, cpu = 7, torch.device("cpu")
    prompts = [
        Prompt(
            key=str(i),
            input_ids=torch.tensor([1, *[image] * tokens, 2]),
            positions=torch.tensor([[0, *[1] * tokens, 3]] * 3),
            images={"pixel_values": torch.full((tokens * 4, 3), float(i))},
            truth="",
        )
        for i, tokens in enumerate((1, 2))
    ]
    first, second = prompts
    batch = pack(
        [Item(first, [4, 5]), Item(first, [8, 9, 5]), Item(second, [6]), Item(first, [4, 3])],
        image,
        cpu,
    )
    assert batch.input_ids.tolist() == [[1, 7, 2, 4, 8, 9, 1, 7, 7, 2, 1, 7, 2, 4]]
    assert batch.positions[0, 0].tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]
    for row in batch.positions[1:, 0].tolist():
        assert row == [0, 1, 3, 4, 4, 5, 0, 1, 1, 3, 0, 1, 3, 4]
    assert batch.rows.tolist() == [2, 3, 2, 4, 5, 9, 12, 13]
    assert batch.targets.tolist() == [4, 5, 8, 9, 5, 6, 4, 3]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert batch.image_at.tolist() == [1, 7, 8, 11]
    assert batch.feature_of.tolist() == [0, 1, 2, 0]
    assert batch.images["pixel_values"][:, 0].tolist() == [0.0] * 4 + [1.0] * 8
    assert batch.packed.cu_q.tolist() == [0, 3, 4, 6, 10, 13, 14]
    assert batch.packed.cu_k.tolist() == [0, 3, 7, 12, 16, 19, 23]


def test_text_prompts_pack_alone_and_beside_pictures(policy: Policy, tiny: Tiny) -> None:
    length = 6
    text = Prompt("text", torch.arange(20, 20 + length), torch.arange(length).expand(3, -1), {}, "")
    words = Item(text, [30, 31, 32])
    with torch.no_grad():
        alone = policy.logprobs(packed(policy, [words]), temperature=1.0)
        beside = policy.logprobs(packed(policy, [words, *tiny.items()]), temperature=1.0)
        logits = tiny.model()(input_ids=torch.tensor([[*text.input_ids, 30, 31, 32]])).logits[0]
    logits[:, list(tiny.banned)] = float("-inf")
    wanted = logits[length - 1 : -1].log_softmax(-1).gather(1, torch.tensor([[30], [31], [32]]))
    torch.testing.assert_close(alone, wanted[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(beside[:3], alone, rtol=0, atol=1e-5)


def test_nothing_to_score_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="needs items"):
        pack([], 0, CPU)
    with pytest.raises(ValueError, match="at least one completion token"):
        pack([tiny.items()[0], Item(tiny.items()[0].prompt, [])], 0, CPU)


def test_padded_attention_equals_each_sequence_alone() -> None:
    lengths, heads, groups, width = [3, 1, 8, 5], 4, 2, 6
    draw = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        x = torch.randn(1, count, sum(lengths), width, dtype=torch.float64, generator=draw)
        return x.requires_grad_()

    q, k, v = rows(heads), rows(groups), rows(groups)
    upstream = torch.randn(1, sum(lengths), heads, width, dtype=torch.float64, generator=draw)
    at = packing([(length, []) for length in lengths], CPU)
    found, _ = packed_attention(nn.Identity(), q, k, v, None, scaling=0.3, packed=at)
    found_grads = torch.autograd.grad((found * upstream).sum(), (q, k, v))
    parts = []
    for one_q, one_k, one_v in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(heads // groups, 1) for x in (one_k, one_v))
        scores = 0.3 * one_q @ keys.transpose(2, 3)
        size = scores.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool).triu(1)
        parts.append(F.softmax(scores.masked_fill(later, float("-inf")), -1) @ values)
    wanted = torch.cat(parts, 2).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    wanted_grads = torch.autograd.grad((wanted * upstream).sum(), (q, k, v))
    torch.testing.assert_close(found_grads, wanted_grads)


def test_attention_refuses_what_it_would_get_wrong() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="packed="):
        packed_attention(nn.Identity(), x, x, x, None)
    with pytest.raises(ValueError, match="sliding window.*4096"):
        packed_attention(
            nn.Identity(), x, x, x, None, packed=packing([(3, [])], CPU), sliding_window=4096
        )


def test_the_cpu_takes_the_padded_route() -> None:
    assert choose_route("auto", CPU, torch.bfloat16) == "sdpa"
