"""Rollouts by the real SGLang, against transformers' own unpacked forward of the same weights."""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speciarl.core.batch import Item
from speciarl.rollout.engine import Prompt, Request, Rollout, RolloutEngine, Sampling
from speciarl.rollout.engine import WeightsRefused as Refused
from speciarl.rollout.native import NativeEngine
from tiny import KINDS, Tiny, perturb, plain_logprobs, plain_table

LONGEST = 64
BUCKET = 200_000  # bytes: several buckets, and weights that are larger than one


class Case:
    """A checkpoint, its engine, and transformers' model with the weights the engine has."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        from speciarl.rollout.sglang import SglangEngine, rollout_launch

        self.tiny = Tiny(folder, pictures)
        self.stops = self.tiny.builder.stop_ids
        self.model = self.tiny.model()
        self.engine = SglangEngine(
            rollout_launch(folder, "cpu", dtype="float32", most_requests=64, arguments={}),
            stop_ids=self.stops,
            banned_ids=self.tiny.banned,
            decode=self.tiny.builder.tokenizer.decode,
            longest=LONGEST,
            bucket_bytes=BUCKET,
            primes=folder.name != "toy",
        )
        self.version = 0

    def push(self) -> None:
        self.version += 1
        self.engine.load_weights(self.model.named_parameters(), version=self.version)

    def requests(self, samples: int = 3) -> list[Request]:
        wanted = tuple(range(samples))
        return [Request(prompt, key, wanted) for key, prompt in self.tiny.prompts.items()]

    def sample(self, sampling: Sampling, requests: Sequence[Request] = ()) -> list[Rollout]:
        """Rollouts of all requests, checked against transformers."""
        groups = list(self.engine.generate(list(requests) or self.requests(), sampling))
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert {rollout.weight_version for rollout in rollouts} <= {self.version}
        self.agree(rollouts, sampling.temperature or 1.0)
        return rollouts

    def agree(self, rollouts: Sequence[Rollout], temperature: float) -> None:
        items = [Item(rollout.prompt, rollout.ids) for rollout in rollouts]
        with torch.no_grad():
            wanted = plain_logprobs(self.model, items, self.tiny.banned, temperature)
        found = torch.tensor([x for rollout in rollouts for x in rollout.logprobs])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest, model_dirs: dict[str, Path], pictures: Path
) -> Iterator[Case]:
    case = Case(model_dirs[request.param], pictures)
    yield case
    case.engine.close()


def text_only(tiny: Tiny) -> Prompt:
    ids = torch.tensor(tiny.builder.tokenizer("What is it?", add_special_tokens=False)["input_ids"])
    return Prompt("text", ids, tiny.builder.positions(ids, None), {}, "it")


def greedy_by_hand(case: Case, prompt: Prompt, length: int) -> list[int]:
    """Token after token by transformers, each from a forward of its own."""
    ids: list[int] = []
    while len(ids) < length and not (ids and ids[-1] in case.stops):
        with torch.no_grad():
            table = plain_table(case.model, Item(prompt, [*ids, 0]), case.tiny.banned)
        ids.append(int(table[-1].argmax()))
    return ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_transformers(case: Case, temperature: float) -> None:
    sampling = Sampling(temperature, max_new_tokens=7)
    rollouts = case.sample(sampling, [*case.requests(), Request(text_only(case.tiny), "t", (0, 4))])
    assert isinstance(case.engine, RolloutEngine)
    assert len(rollouts) == 3 * len(case.tiny.prompts) + 2
    assert len({tuple(rollout.ids) for rollout in rollouts}) > len(rollouts) // 2
    assert case.engine.dropped == Counter()


def test_greedy(case: Case) -> None:
    greedy = Sampling(0.0, max_new_tokens=5)
    for rollout in case.sample(greedy, case.requests(1)):
        assert rollout.ids == greedy_by_hand(case, rollout.prompt, 5)


def test_top_p_and_top_k_cut_the_choice_not_the_log_probs(case: Case) -> None:
    narrow = Sampling(1.0, top_p=0.5, top_k=3, max_new_tokens=4)
    for rollout in case.sample(narrow):
        with torch.no_grad():
            table = plain_table(case.model, Item(rollout.prompt, rollout.ids), case.tiny.banned)
        ranks = (table > table.gather(1, torch.tensor(rollout.ids)[:, None])).sum(1)
        assert ranks.max() < 3


def test_why_a_completion_ended(case: Case) -> None:
    rollouts = case.sample(Sampling(max_new_tokens=8), case.requests(8))
    assert {rollout.finish_reason for rollout in rollouts} <= {"stop", "length"}
    for rollout in rollouts:
        stopped = rollout.finish_reason == "stop"
        assert (rollout.ids[-1] in case.stops) == stopped
        assert stopped or len(rollout.ids) == 8
        assert not set(rollout.ids[:-1]) & set(case.stops)


@pytest.mark.parametrize("limit", [3, 6])
def test_stop_at_a_text(case: Case, limit: int) -> None:
    """The same as cutting greedy completions, which the text does not change, after it."""
    decode = case.tiny.builder.tokenizer.decode
    free = case.sample(Sampling(0.0, max_new_tokens=6), case.requests(1))
    letters = Counter(letter for rollout in free for letter in {*decode(rollout.ids[1:])})
    text = letters.most_common(1)[0][0]
    cut = Sampling(0.0, max_new_tokens=limit, stop_text=text)
    found = {r.group_key: r for r in case.sample(cut, case.requests(1))}
    for rollout in free:
        ends = [n for n in range(1, limit + 1) if text in decode(rollout.ids[:n])]
        end = min([*ends[:1], len(rollout.ids), limit])
        assert found[rollout.group_key].ids == rollout.ids[:end]
        stopped = bool(ends) or rollout.ids[end - 1] in case.stops
        assert (found[rollout.group_key].finish_reason == "stop") == stopped
    assert any(rollout.finish_reason == "stop" for rollout in found.values())


def test_groups_keep_order_and_may_be_abandoned(case: Case) -> None:
    first, second = islice(case.tiny.prompts.values(), 2)
    shared = [Request(first, "shared", (4, 2)), Request(second, "shared", (2, 4))]
    (group,) = case.engine.generate(shared, Sampling(max_new_tokens=3))
    order = [(rollout.prompt.key, rollout.sample_id) for rollout in group.rollouts]
    assert order == [(first.key, 4), (first.key, 2), (second.key, 2), (second.key, 4)]
    assert list(case.engine.generate([], Sampling())) == []
    stream = case.engine.generate(case.requests(), Sampling(max_new_tokens=30))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    case.sample(Sampling(max_new_tokens=3))


def test_samples_find_their_prompt_in_the_cache(case: Case) -> None:
    case.push()  # which empties it
    engine = case.engine
    asked, found = engine.prompt_tokens, engine.cached_tokens
    case.sample(Sampling(max_new_tokens=2), case.requests(10))
    prompts = sum(len(prompt.input_ids) for prompt in case.tiny.prompts.values())
    assert engine.prompt_tokens - asked == 10 * prompts
    if case.tiny.folder.name != "toy":  # every sample but for the last token of its prompt
        assert engine.cached_tokens - found == 10 * (prompts - len(case.tiny.prompts))


def test_what_sglang_refuses_is_left_out_and_counted(case: Case) -> None:
    good = next(iter(case.tiny.prompts.values()))
    ids = good.input_ids.new_full((100_000,), 5)
    long = Prompt("long", ids, ids.expand(3, -1), {}, "")
    wanted = [
        Request(good, "mixed", (0,)),
        Request(long, "mixed", (0, 1)),
        Request(long, "x", (7,)),
    ]
    groups = {g.group_key: g.rollouts for g in case.engine.generate(wanted, Sampling())}
    assert [rollout.prompt.key for rollout in groups["mixed"]] == [good.key]
    assert groups["x"] == []
    ((reason, count),) = case.engine.dropped.items()
    assert reason.startswith("refused by SGLang: ") and count == 3
    case.engine.dropped.clear()


def test_what_is_aborted_is_left_out_and_counted(case: Case) -> None:
    host = case.engine._host
    groups = case.engine.generate(case.requests(4), Sampling(0.5, max_new_tokens=400))
    over = threading.Event()

    def abort() -> None:
        host._engine.tokenizer_manager.abort_request(abort_all=True)

    def keep_aborting() -> None:  # whatever has arrived at the scheduler by then
        while not over.wait(0.02):
            host._loop.call_soon_threadsafe(abort)

    thread = threading.Thread(target=keep_aborting)
    thread.start()
    found = {group.group_key: len(group.rollouts) for group in groups}
    over.set()
    thread.join()
    assert found.keys() == case.tiny.prompts.keys()
    lost = 4 * len(found) - sum(found.values())
    assert 0 < lost == case.engine.dropped.total()
    assert all(reason.startswith("aborted by SGLang: ") for reason in case.engine.dropped)
    case.engine.dropped.clear()
    case.sample(Sampling(max_new_tokens=2))


# Pushes. The images of all tests were seen by the engine before the first of them.


def test_a_push_is_a_fresh_load(case: Case, tmp_path: Path) -> None:
    seen = case.sample(Sampling(0.0, max_new_tokens=4), case.requests(1))
    perturb(dict(case.model.named_parameters()), 0.1)
    case.push()
    pushed = case.engine.pushed
    assert pushed.bytes == sum(p.nbytes for p in case.model.parameters())
    assert 4 <= pushed.buckets < len(list(case.model.parameters()))
    now = case.sample(Sampling(0.0, max_new_tokens=4), case.requests(1))
    by_key = {rollout.group_key: rollout.logprobs for rollout in seen}
    assert all(by_key[rollout.group_key] != rollout.logprobs for rollout in now)

    case.model.save_pretrained(tmp_path)
    fresh: Any = type(case.model).from_pretrained(tmp_path)
    native = NativeEngine(fresh, stop_ids=case.stops, banned_ids=case.tiny.banned)
    loaded = list(native.generate(case.requests(1), Sampling(0.0, max_new_tokens=4)))
    ids = {group.group_key: group.rollouts[0].ids for group in loaded}
    assert {rollout.group_key: rollout.ids for rollout in now} == ids


def test_pushes_leave_nothing_open(case: Case) -> None:
    case.push()
    before = len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))
    for _ in range(5):
        case.push()
    assert (len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))) == before


def faulty(case: Case) -> dict[str, list[tuple[str, Tensor]]]:
    named = list(case.model.named_parameters())
    name, tensor = named[5]
    return {
        "did not come": named[:-1],
        f"unknown weight {name}x": [*named[:5], (f"{name}x", tensor)],
        "has shape": [*named[:5], (name, tensor[:-1])],
        "came twice": [*named[:6], named[5]],
    }


def test_a_faulty_push_is_refused_until_a_whole_one_comes(case: Case) -> None:
    for problem, named in faulty(case).items():
        with pytest.raises(Refused, match=problem):
            case.engine.load_weights(named, version=99)
        with pytest.raises(Refused, match="no complete weights .* version 99"):
            case.engine.generate(case.requests(), Sampling())
        case.push()
        case.sample(Sampling(max_new_tokens=2), case.requests(1))


def test_banned_ids_are_never_sampled(case: Case) -> None:
    """Weights under which nothing but a placeholder would come, and log-probs without it."""
    head = case.model.get_output_embeddings().weight
    before = head.detach().clone()
    with torch.no_grad():
        usual = head.norm(dim=1).median()
        for sign, token in zip((1, -1), case.tiny.banned, strict=True):
            head[token] = sign * 100 * usual * torch.nn.functional.normalize(head[7], dim=0)
    case.push()
    found = case.sample(Sampling(max_new_tokens=6))
    free = plain_table(case.model, Item(found[0].prompt, found[0].ids), ()).exp()
    assert free[:, list(case.tiny.banned)].sum(1).max() > 0.9
    assert not {token for rollout in found for token in rollout.ids} & set(case.tiny.banned)
    with torch.no_grad():
        head.copy_(before)
    case.push()


def test_sleep_and_wake(case: Case) -> None:
    case.engine.sleep()
    case.engine.sleep()
    with pytest.raises(RuntimeError, match=r"asleep: call wake\(\) before generate"):
        case.engine.generate(case.requests(), Sampling())
    case.engine.wake()
    case.sample(Sampling(max_new_tokens=2), case.requests(1))  # a CPU keeps what it has
    case.engine.sleep()
    case.push()
    case.sample(Sampling(max_new_tokens=2), case.requests(1))
    case.engine.check()


def test_samples_that_are_too_long_for_the_engine(model_dirs: dict[str, Path]) -> None:
    from speciarl.rollout.sglang import SglangEngine, rollout_launch

    few = {"max_total_tokens": 256}
    launch = rollout_launch(model_dirs["toy"], "cpu", most_requests=2, arguments=few)
    with pytest.raises(ValueError, match=r"up to 400 tokens .*max_prompt_tokens.* takes 2\d\d"):
        SglangEngine(launch, stop_ids=(), banned_ids=(), decode=str, longest=400)
