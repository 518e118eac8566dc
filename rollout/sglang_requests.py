"""Requests to an SGLang engine, side by side in its event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from speciarl.rollout.engine import Prompt, Request, Sampling
from speciarl.rollout.seeds import request_seed
from speciarl.rollout.waves import Row

T = TypeVar("T")
_BANNED = -1e9  # added to a logit: far below all others in any dtype, and no infinity
Answer = Mapping[str, Any] | str
"""The meta_info of a finished request, or why there is none."""


async def answer_of(engine: Any, **request: Any) -> Answer:
    """What comes of one request; it may be refused at the door, given up, or aborted on the way."""
    from fastapi import HTTPException

    try:
        answer = await engine.async_generate(**request)
    except ValueError as error:
        return f"refused by SGLang: {error}"
    except HTTPException as error:  # in process too
        return f"given up by SGLang: {error.detail}"
    meta: Mapping[str, Any] = answer["meta_info"]
    reason = meta["finish_reason"]
    return f"aborted by SGLang: {reason['message']}" if reason["type"] == "abort" else meta


async def as_finished(work: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[T]:
    """What they return, as it comes; those under way are cancelled when the iterator is closed."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for task in tasks:
            task.cancel()


def sampling_parameters(
    sampling: Sampling, stops: frozenset[int], banned: frozenset[int]
) -> dict[str, Any]:
    """SGLang's sampling parameters, but for the seed."""
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": sorted(stops),
        "logit_bias": {str(token): _BANNED for token in sorted(banned)},
    }
    if not stops:
        parameters["ignore_eos"] = True
    if sampling.stop_text:
        # A plain stop string is sought only where the tokenizer would have put it.
        parameters["stop_regex"] = re.escape(sampling.stop_text)
    return parameters


async def samples(
    engine: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    parameters: dict[str, Any],
    primes: bool,
) -> AsyncIterator[tuple[Row, Answer]]:
    """What comes of each sample, as the engine finishes it.

    primes: a prompt of several samples passes once before they are asked for.
    """

    async def send(prompt: Prompt, **how: Any) -> Answer:
        images = [{**prompt.images, "format": "processor_output"}] if prompt.images else None
        return await answer_of(
            engine, input_ids=prompt.input_ids.tolist(), image_data=images, **how
        )

    async def ask(row: Row) -> tuple[Row, Answer]:
        prompt = requests[row.request].prompt
        if row.request in first:
            await first[row.request]
        seed = request_seed(sampling.seed, sampling.step, prompt.key, row.sample_id)
        given = {**parameters, "sampling_seed": seed}
        return row, await send(prompt, sampling_params=given, return_logprob=True)

    first = {
        i: asyncio.ensure_future(send(request.prompt, sampling_params={"max_new_tokens": 0}))
        for i, request in enumerate(requests)
        if primes and len(request.sample_ids) > 1
    }
    rows = [Row(i, sample) for i, request in enumerate(requests) for sample in request.sample_ids]
    try:
        async for answer in as_finished(map(ask, rows)):
            yield answer
    finally:
        for task in first.values():
            task.cancel()
