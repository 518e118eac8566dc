"""The same completions end at a text in SGLang and in the native engine."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from speciarl.core.toymodel import toy_tokenizer
from speciarl.rollout.sglang_scope import unchanged
from speciarl.rollout.sglang_settings import Launch
from speciarl.rollout.stops import ANSWER_END, TextStop

TOO_MANY_TOKENS = "\U0001f33c!"
TEXTS = (ANSWER_END, "er>", "> x", "é", "aü>", TOO_MANY_TOKENS, "\n", " I", "<|im_end|>")


def sglang_end(parts: Any, tokenizer: Any, ids: list[int], text: str) -> int | None:
    """Number of tokens after which SGLang's scheduler ends a request."""
    params = parts.SamplingParams(max_new_tokens=len(ids) + 1, stop_regex=re.escape(text))
    params.normalize(tokenizer)
    request = parts.Req.__new__(parts.Req)
    request.sampling_params, request.tokenizer, request.output_ids = params, tokenizer, []
    request.decoded_text, request.finished_reason = "", None
    for token in ids:
        request.output_ids.append(token)
        if request._check_str_based_finish():
            return len(request.output_ids)
    return None


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    with unchanged({"SGLANG_USE_CPU_ENGINE": "1"}):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams
    return SimpleNamespace(Req=Req, SamplingParams=SamplingParams)


@pytest.mark.parametrize("text", TEXTS)
def test_the_scheduler_ends_requests_at_the_same_token(parts: SimpleNamespace, text: str) -> None:
    tokenizer = toy_tokenizer()
    draw = np.random.default_rng(3)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = [c for c in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    bytewise = [tokenizer.get_vocab()[c] for word, _ in letters for c in word]
    stop, ended = TextStop(text, tokenizer.decode, len(tokenizer)), 0
    for _ in range(150):
        ids = draw.integers(0, len(tokenizer), 20)
        hidden = (whole, bytewise, bytewise[1:], [])[draw.integers(4)]
        at = draw.integers(0, 20 - len(hidden))
        ids[at : at + len(hidden)] = hidden
        found = None
        for n in range(1, 21):
            if stop.ended(ids[None, max(0, n - stop.window) : n])[0]:
                found = n
                break
        assert found == sglang_end(parts, tokenizer, ids.tolist(), text)
        ended += found is not None
    # A text whose one character takes more tokens than SGLang looks at is never found.
    assert 10 < ended < 150 if text != TOO_MANY_TOKENS else ended == 0


def test_an_engine_ends_where_the_text_does(judge_dirs: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    from speciarl.rollout.sglang_launch import Host

    folder = judge_dirs["toy"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(words)["input_ids"] for words in ("What is it?", "a golden bird", "I see")]

    def ask(host: Any, **more: Any) -> list[Any]:
        params = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True, **more}
        return host.run(lambda engine: engine.loop.run_until_complete(_all(engine, params)))

    async def _all(engine: Any, params: dict[str, Any]) -> list[Any]:
        return [
            await engine.async_generate(
                input_ids=ids, sampling_params=params, return_logprob=True, logprob_start_len=-1
            )
            for ids in prompts
        ]

    host = Host(Launch(folder, "cpu", dtype="float32"))
    try:
        free = [_ids(answer) for answer in ask(host)]
        text = tokenizer.decode(free[0][5:8])[1:]
        answers = ask(host, stop_regex=re.escape(text))
    finally:
        host.close()
    stop = TextStop(text, tokenizer.decode, len(tokenizer))
    for before, answer in zip(free, answers, strict=True):
        tails = (np.array([before[max(0, n - stop.window) : n]]) for n in range(1, 25))
        end = next((n for n, tail in enumerate(tails, 1) if stop.ended(tail)[0]), None)
        assert _ids(answer) == before[:end]
        reason = answer["meta_info"]["finish_reason"]["type"]
        assert reason == ("length" if end is None else "stop")
    assert len(_ids(answers[0])) <= 8


def _ids(answer: Any) -> list[int]:
    return [token for _, token, *_ in answer["meta_info"]["output_token_logprobs"]]
