"""The native engine against transformers' own forward and generate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speciarl.rollout.engine import Prompt, Request, Rollout, Sampling
from speciarl.rollout.native import NativeEngine
from tiny import KINDS, Tiny

ROUTES = ("fused", "generic")


class Case:
    """A tiny checkpoint, transformers' model of it, and prompts of several image sizes."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.tiny = Tiny(folder, pictures)
        self.plain = self.tiny.model().eval()
        text = torch.tensor(self.tiny.builder.tokenizer("What is it?")["input_ids"])
        positions = torch.arange(len(text)).expand(3, -1)
        self.prompts = [*self.tiny.prompts.values(), Prompt("text", text, positions, {}, "")]
        # Frequent enough that many completions end early.
        self.stops = list(range(100, 130))

    def engine(self, route: str = "auto", **options: Any) -> NativeEngine:
        options = {"stop_ids": self.stops, "banned_ids": self.tiny.banned} | options
        return NativeEngine(self.tiny.model(), route=route, **options)


@pytest.fixture(scope="module")
def cases(model_dirs: dict[str, Path], pictures: Path) -> dict[str, Case]:
    return {kind: Case(folder, pictures) for kind, folder in model_dirs.items()}


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def requests(prompts: Sequence[Prompt], samples: int = 3) -> list[Request]:
    return [Request(prompt, prompt.key, tuple(range(samples))) for prompt in prompts]


def rollouts(engine: NativeEngine, wanted: list[Request], sampling: Sampling) -> list[Rollout]:
    groups = {group.group_key: group for group in engine.generate(wanted, sampling)}
    return [r for request in wanted for r in groups[request.group_key].rollouts]


def ids(found: Sequence[Rollout]) -> list[tuple[str, int, list[int]]]:
    return [(r.prompt.key, r.sample_id, r.ids) for r in found]


def given(found: Sequence[Rollout]) -> Tensor:
    return torch.tensor([value for rollout in found for value in rollout.logprobs])


@torch.no_grad()
def plain_logprobs(
    model: Any, found: Sequence[Rollout], banned: Sequence[int], temperature: float
) -> Tensor:
    """Each completion by a forward of its own over the whole sequence."""
    out = []
    for rollout in found:
        new = torch.tensor(rollout.ids)
        ids = torch.cat([rollout.prompt.input_ids, new])[None]
        kinds = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **rollout.prompt.images).logits
        logits = logits[0, -len(new) - 1 : -1].float() / temperature
        table = logits.index_fill(1, torch.tensor(banned), -torch.inf).log_softmax(-1)
        out.append(table.gather(1, new[:, None])[:, 0])
    return torch.cat(out)


def assert_logprobs(case: Case, found: Sequence[Rollout], temperature: float = 1.0) -> None:
    wanted = plain_logprobs(case.plain, found, case.tiny.banned, temperature)
    # The logits of these sharpened weights reach 40: rounding alone is 1e-5.
    torch.testing.assert_close(given(found), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_greedy_equals_generate(case: Case, route: str) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=12)
    found = rollouts(case.engine(route), requests(case.prompts, 1), sampling)
    for rollout, prompt in zip(found, case.prompts, strict=True):
        inputs = {"input_ids": prompt.input_ids[None], **prompt.images}
        kinds = (prompt.input_ids == case.plain.config.image_token_id).int()[None]
        out = case.plain.generate(
            **inputs, mm_token_type_ids=kinds, attention_mask=torch.ones_like(kinds),
            do_sample=False, max_new_tokens=12, eos_token_id=case.stops, pad_token_id=0,
            suppress_tokens=list(case.tiny.banned),
        )  # fmt: skip
        assert rollout.ids == out[0, len(prompt.input_ids) :].tolist()
    assert_logprobs(case, found)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.6), Sampling(top_k=9, top_p=0.7)])
def test_logprobs_equal_a_forward_of_the_whole_sequence(
    case: Case, route: str, sampling: Sampling
) -> None:
    found = rollouts(case.engine(route), requests(case.prompts), sampling)
    assert len({len(rollout.ids) for rollout in found}) > 3, "rows must leave at different times"
    assert_logprobs(case, found, sampling.temperature)


def test_completions_longer_than_a_block(cases: dict[str, Case]) -> None:
    engine = cases["toy"].engine(stop_ids=[])
    found = rollouts(engine, requests(cases["toy"].prompts[:2], 2), Sampling(max_new_tokens=140))
    assert {len(rollout.ids) for rollout in found} == {140}
    assert_logprobs(cases["toy"], found)


def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    sampling, engine = Sampling(seed=5, step=2, max_new_tokens=16), case.engine()
    wanted = requests(case.prompts)
    together = ids(rollouts(engine, wanted, sampling))
    assert len({tuple(sample) for _, _, sample in together}) > len(together) // 2
    alone = [s for r in wanted for s in ids(rollouts(engine, [r], sampling))]
    assert alone == together
    for options in ({"max_rows": 2}, {"max_rows": 4}, {"prefill_tokens": 40}):
        assert ids(rollouts(case.engine(**options), wanted, sampling)) == together
    backwards = ids(rollouts(engine, wanted[::-1], sampling))
    assert sorted(backwards) == sorted(together)
    single = [Request(wanted[1].prompt, "one", (2,))]
    assert ids(rollouts(engine, single, sampling))[0][2] == together[5][2]


def test_seed_and_step_change_the_samples(cases: dict[str, Case]) -> None:
    engine, wanted = cases["toy"].engine(), requests(cases["toy"].prompts[:2])
    ways = [Sampling(), Sampling(), Sampling(seed=1), Sampling(step=1)]
    first, again, seed, step = (ids(rollouts(engine, wanted, way)) for way in ways)
    assert first == again and first != seed and first != step and seed != step


def test_both_routes_sample_the_same(case: Case) -> None:
    wanted, sampling = requests(case.prompts), Sampling(max_new_tokens=8)
    fused, generic = (rollouts(case.engine(route), wanted, sampling) for route in ROUTES)
    assert ids(fused) == ids(generic)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_banned_ids_are_never_sampled(cases: dict[str, Case], temperature: float) -> None:
    case, sampling = cases["toy"], Sampling(temperature=temperature, max_new_tokens=8)
    free = rollouts(case.engine(banned_ids=[]), requests(case.prompts), sampling)
    banned = sorted({token for rollout in free for token in rollout.ids})[::2]
    found = rollouts(case.engine(banned_ids=banned), requests(case.prompts), sampling)
    assert len(banned) > 3
    assert not {token for rollout in found for token in rollout.ids} & set(banned)


def test_why_a_completion_ended(case: Case) -> None:
    sampling = Sampling(max_new_tokens=10)
    found = rollouts(case.engine(), requests(case.prompts, 6), sampling)
    assert {rollout.finish_reason for rollout in found} == {"stop", "length"}
    for rollout in found:
        assert not set(rollout.ids[:-1]) & set(case.stops)
        assert len(rollout.ids) == len(rollout.logprobs) <= 10
        assert (rollout.ids[-1] in case.stops) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.ids) == 10


def test_groups_come_as_soon_as_they_are_complete(cases: dict[str, Case]) -> None:
    case, steps = cases["toy"], []
    engine = case.engine("generic")
    language = engine.model.model.language_model
    language.register_forward_hook(lambda *_: steps.append(1))
    came = []
    for group in engine.generate(requests(case.prompts, 2), Sampling(max_new_tokens=30)):
        came.append(len(steps))
        assert [rollout.sample_id for rollout in group.rollouts] == [0, 1]
        # One forward for the prompts, then one for every token but the first.
        assert len(steps) == max(len(rollout.ids) for rollout in group.rollouts)
    assert len(came) == len(case.prompts) and len(set(came)) > 2


def test_samples_share_a_row_until_they_part(cases: dict[str, Case]) -> None:
    case = cases["toy"]
    engine, rows = case.engine("generic", stop_ids=[]), []
    language = engine.model.model.language_model
    language.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    found = rollouts(engine, requests(case.prompts, 5), Sampling(0.3, max_new_tokens=9))
    beginnings = [{(r.prompt.key, *r.ids[:n]) for r in found} for n in range(9)]
    assert rows == [len(distinct) for distinct in beginnings]
    assert len(case.prompts) < rows[1] < rows[-1] <= len(found)


def test_a_group_over_several_prompts_and_an_empty_call(cases: dict[str, Case]) -> None:
    case, engine = cases["toy"], cases["toy"].engine()
    wanted = [Request(prompt, "shared", (4, 2)) for prompt in case.prompts[:3]]
    (group,) = engine.generate(wanted, Sampling(max_new_tokens=4))
    order = [(rollout.prompt.key, rollout.sample_id) for rollout in group.rollouts]
    assert order == [(p.key, sample) for p in case.prompts[:3] for sample in (4, 2)]
    assert list(engine.generate([], Sampling())) == []


def test_one_picture_in_two_prompts_passes_the_vision_tower_once(case: Case) -> None:
    first, other = case.prompts[0], case.prompts[1]
    ids = torch.cat([first.input_ids, torch.tensor([5])])
    last = first.positions[:, -1:] + 1
    longer = Prompt("longer", ids, torch.cat([first.positions, last], 1), first.images, "")
    engine, patches = case.engine(), []
    vision = engine.model.model.visual
    vision.register_forward_pre_hook(lambda _, inputs: patches.append(len(inputs[0])))
    found = rollouts(engine, requests([longer, other, first]), Sampling(max_new_tokens=5))
    assert patches == [len(first.images["pixel_values"]) + len(other.images["pixel_values"])]
    assert_logprobs(case, found)


@pytest.mark.parametrize("route", ROUTES)
def test_half_precision_stays_near_full_precision(cases: dict[str, Case], route: str) -> None:
    case = cases["toy"]
    model = case.tiny.model(torch.bfloat16)
    engine = NativeEngine(model, stop_ids=case.stops, banned_ids=case.tiny.banned, route=route)
    found = rollouts(engine, requests(case.prompts), Sampling(temperature=2.0))
    half = case.tiny.model(torch.bfloat16).eval()
    wanted = plain_logprobs(case.plain, found, case.tiny.banned, 2.0)
    plain = plain_logprobs(half, found, case.tiny.banned, 2.0)
    assert (given(found) - wanted).abs().mean() < 1.2 * (plain - wanted).abs().mean()


def test_placeholders_without_features_are_an_error(cases: dict[str, Case]) -> None:
    case = cases["toy"]
    wrong = Prompt(
        "wrong", case.prompts[0].input_ids[8:], case.prompts[0].positions[:, 8:],
        case.prompts[0].images, "",
    )  # fmt: skip
    with pytest.raises(ValueError, match="image placeholders.*features: wrong"):
        list(case.engine().generate(requests([wrong]), Sampling()))
