"""Completions that end at a text: against a search of the whole decoded completion."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from speciarl.core.toymodel import toy_tokenizer
from speciarl.rollout.engine import Request, Rollout, Sampling
from speciarl.rollout.native import NativeEngine
from speciarl.rollout.registry import RolloutConfig
from speciarl.rollout.stops import ANSWER_END, TextStop
from tiny import Tiny

Decode = Callable[[list[int]], str]
ROUTES = ("fused", "generic")
TEXT = "</a>"
# Tokens that hold the text, end it and go on, begin it, or have its last character and no more.
PIECES = ("<", "</", "/a", "a", ">", ">.", "a>b<", "</a", "</a>", "x</a>y", "/a>", "->", "b", " ")


def pieces(ids: list[int]) -> str:
    return "".join(PIECES[i % len(PIECES)] for i in ids)


def first_end(ids: Sequence[int], text: str, decode: Decode) -> int | None:
    """Number of tokens up to the one that completes the text, by decoding everything."""
    lengths = (n for n in range(1, len(ids) + 1) if text in decode(list(ids[:n])))
    return next(lengths, None)


def first_ends(stop: TextStop, samples: np.ndarray) -> list[int | None]:
    """The same as a decode loop asks, one token after another, for all samples at once."""
    found: list[int | None] = [None] * len(samples)
    for n in range(1, samples.shape[1] + 1):
        ended = stop.ended(samples[:, max(0, n - stop.window) : n])
        for row in np.flatnonzero(ended).tolist():
            found[row] = found[row] or n
    return found


@pytest.mark.parametrize("text", [TEXT, ">", "a>", "</a>y", "->x<", "a b", "b "])
def test_the_first_end_is_found_however_the_text_is_split(text: str) -> None:
    samples = np.random.default_rng(len(text)).integers(0, len(PIECES), (400, 24))
    wanted = [first_end(row.tolist(), text, pieces) for row in samples]
    assert first_ends(TextStop(text, pieces, len(PIECES)), samples) == wanted
    assert 10 < sum(end is not None for end in wanted)


@pytest.mark.parametrize("text", [ANSWER_END, "</think>", "<an", ". ", "é", "ü>", "\n"])
def test_the_toy_tokenizer(text: str) -> None:
    tokenizer = toy_tokenizer()
    draw = np.random.default_rng(1)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    bytewise = [tokenizer.get_vocab()[c] for c in _bytes(text)]
    samples = draw.integers(0, len(tokenizer), (60, 40))
    for row in samples[:50]:
        hidden = [whole, bytewise, bytewise[:-1]][draw.integers(3)]
        at = draw.integers(0, 40 - len(hidden))
        row[at : at + len(hidden)] = hidden
    wanted = [first_end(row.tolist(), text, tokenizer.decode) for row in samples]
    assert first_ends(TextStop(text, tokenizer.decode, len(tokenizer)), samples) == wanted
    assert {None} < set(wanted)


def _bytes(text: str) -> list[str]:
    """The byte-level tokens of a text, one a byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [c for word, _ in ByteLevel(False, use_regex=False).pre_tokenize_str(text) for c in word]


def test_special_tokens_part_a_text() -> None:
    tokenizer = toy_tokenizer()
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [tokenizer.get_vocab()[c] for c in _bytes(ANSWER_END)]
    stop = TextStop(ANSWER_END, tokenizer.decode, len(tokenizer))
    split = [*ids[:4], special, *ids[4:]]
    assert first_ends(stop, np.array([ids + [5]])) == [len(ids)]
    assert first_ends(stop, np.array([split])) == [None]


def test_only_tokens_with_the_last_character_are_decoded_again() -> None:
    asked: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        asked.append(ids)
        return pieces(ids)

    stop = TextStop(TEXT, decode, len(PIECES))
    samples = np.random.default_rng(0).integers(0, len(PIECES), (64, 32))
    first_ends(stop, samples)
    alone = [ids for ids in asked if len(ids) == 1]
    tails = [ids for ids in asked if len(ids) > 1]
    assert len(alone) <= 2 * len(PIECES) + 64  # each token once, and first tokens of samples
    holds = sum(">" in PIECES[i] for i in samples.ravel())
    assert len(tails) <= holds
    assert {len(ids) for ids in tails} <= set(range(2, stop.window + 1))
    with pytest.raises(ValueError, match="empty text"):
        TextStop("", decode, 3)


@pytest.fixture(scope="module")
def toy(model_dirs: dict[str, Path], pictures: Path) -> Tiny:
    return Tiny(model_dirs["toy"], pictures)


def engine(toy: Tiny, decode: Decode | None = pieces, route: str = "auto") -> NativeEngine:
    stops = list(range(100, 104))
    return NativeEngine(
        toy.model(), stop_ids=stops, banned_ids=toy.banned, decode=decode, route=route
    )


def sampled(machine: NativeEngine, toy: Tiny, sampling: Sampling, n: int = 8) -> list[Rollout]:
    wanted = [Request(prompt, key, tuple(range(n))) for key, prompt in toy.prompts.items()]
    groups = {group.group_key: group for group in machine.generate(wanted, sampling)}
    return [rollout for key in toy.prompts for rollout in groups[key].rollouts]


def cut(free: Rollout, text: str, decode: Decode) -> tuple[list[int], list[float], str]:
    """What a completion without a stop text becomes with one."""
    end = first_end(free.ids, text, decode)
    if end is None:
        return free.ids, free.logprobs, free.finish_reason
    return free.ids[:end], free.logprobs[:end], "stop"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("temperature", "text"), [(1.0, TEXT), (1.0, "a>"), (4.0, TEXT), (0.0, ">"), (0.0, "a")]
)
def test_the_native_engine_ends_where_a_search_does(
    toy: Tiny, route: str, temperature: float, text: str
) -> None:
    machine = engine(toy, route=route)
    sampling = Sampling(temperature=temperature, max_new_tokens=20)
    free = sampled(machine, toy, sampling)
    found = sampled(machine, toy, Sampling(temperature, max_new_tokens=20, stop_text=text))
    ended = 0
    for before, after in zip(free, found, strict=True):
        ids, logprobs, reason = cut(before, text, pieces)
        assert (after.ids, after.finish_reason) == (ids, reason)
        assert after.logprobs == pytest.approx(logprobs, abs=2e-5)
        ended += len(ids) < len(before.ids)
    assert ended > 3


def test_a_text_of_the_toy_tokenizer(toy: Tiny) -> None:
    decode = toy.builder.tokenizer.decode
    machine = engine(toy, decode)
    free = sampled(machine, toy, Sampling(max_new_tokens=16))
    for rollout in [r for r in free if len(r.ids) > 8][:4]:
        text = decode(rollout.ids[3:6])[1:]
        found = sampled(machine, toy, Sampling(max_new_tokens=16, stop_text=text))
        assert [(r.ids, r.finish_reason) for r in found] == [
            (ids, reason) for ids, _, reason in (cut(r, text, decode) for r in free)
        ]
        (same,) = [
            r for r in found if (r.prompt, r.sample_id) == (rollout.prompt, rollout.sample_id)
        ]
        assert len(same.ids) <= 6 and same.finish_reason == "stop"


def test_at_the_length_limit(toy: Tiny) -> None:
    machine = engine(toy)
    free = sampled(machine, toy, Sampling(max_new_tokens=20))
    ends = [(i, first_end(r.ids, TEXT, pieces)) for i, r in enumerate(free)]
    index, end = next((i, end) for i, end in ends if end is not None and end > 4)
    for limit, reason in ((end + 1, "stop"), (end, "stop"), (end - 1, "length")):
        found = sampled(machine, toy, Sampling(max_new_tokens=limit, stop_text=TEXT))[index]
        assert found.ids == free[index].ids[: min(limit, end)]
        assert found.finish_reason == reason


def test_without_a_decode_a_stop_text_is_refused_at_once(toy: Tiny) -> None:
    machine = engine(toy, decode=None)
    assert sampled(machine, toy, Sampling(max_new_tokens=2), 1)
    with pytest.raises(ValueError, match=r"sampling\.stop_text = '</a>'.*without `decode`"):
        machine.generate([], Sampling(stop_text=TEXT))


def test_the_setting() -> None:
    assert RolloutConfig().stop_text == ""
    assert RolloutConfig(stop_at_answer=True).stop_text == "</answer>"
