"""The rollout engine on SGLang, in the trainer's own process and on its GPUs."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speciarl.rollout.engine import (
    EngineDead,
    FinishReason,
    Group,
    Prompt,
    Request,
    Rollout,
    Sampling,
    WeightsRefused,
)
from speciarl.rollout.seeds import request_seed
from speciarl.rollout.sglang_checks import require_shareable_memory
from speciarl.rollout.sglang_launch import Host
from speciarl.rollout.sglang_push import Push, Pushed, Span, manifest_of, no_span
from speciarl.rollout.sglang_settings import Launch
from speciarl.rollout.side_by_side import as_finished
from speciarl.rollout.waves import Assembly, Row

_LOG = logging.getLogger(__name__)
_BANNED = -1e9  # added to a logit: far below all others in any dtype, and no infinity
_WOKEN_FIRST = ["weights", "cuda_graph"]  # the push needs them, keys and values come after it
_ENVIRONMENT = {
    "SGLANG_VLM_CACHE_SIZE_MB": "0",  # image features would survive a push of new weights
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",
}


class SglangEngine:
    """A RolloutEngine over one SGLang engine of this process.

    Each sample is a request of its own; the samples of a prompt share its keys and values through
    SGLang's prefix cache. Asleep on a CUDA device, the engine holds no memory there; on a CPU
    sleeping frees nothing. Samples are drawn by SGLang's own generator: they are reproducible only
    with the server argument enable_deterministic_inference (each request carries its seed).

    Args:
        launch: how the engine is started; see `rollout_launch`.
        stop_ids: tokens that end a completion.
        banned_ids: tokens never sampled and masked in the log-probs.
        decode: the tokenizer's, special tokens kept; for a stop text.
        longest: most tokens of a prompt and its completion together.
        bucket_bytes: most bytes of weights sent at once, see `Push`.
        primes: a prompt of several samples passes once before they are asked for: sent at once
            with it, most would find nothing in the prefix cache yet. None: on a CUDA device; on a
            CPU attention costs the same with a cached prompt.

    Raises what `Host` raises, and ValueError when prompts and completions are too long for the
    model or for the engine's memory.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        longest: int,
        bucket_bytes: int = 512 << 20,
        primes: bool | None = None,
    ) -> None:
        self.ranks = 1
        if launch.device == "cuda":
            require_shareable_memory(os.environ)
        self._stops, self._banned = frozenset(stop_ids), frozenset(banned_ids)
        self._decode = decode
        self._primes = launch.device == "cuda" if primes is None else primes
        self._sleeps = launch.sleeps and launch.device == "cuda"
        self._keeps = launch.keep_weights
        self._asleep = self._shrunk = False
        self._unready = ""
        manifest = manifest_of(launch.model)
        self._host = Host(launch)
        self._push = Push(self._host, manifest, launch.tp_size, bucket_bytes)
        self.dropped: Counter[str] = Counter()
        """Completions that could not be used, by reason."""
        self.prompt_tokens = self.cached_tokens = 0
        """Of all samples so far, and how many of them were in the prefix cache."""
        self.pushed = Pushed()
        """What the last push took."""
        self.span: Span = no_span
        """Reports what a push does; set by whoever keeps a timeline."""
        try:
            _require_length(longest, self._host.run(lambda engine: engine.get_server_info()))
        except BaseException:
            self._host.close()
            raise
        self.about = self._host.features.describe()
        if not launch.arguments.get("enable_deterministic_inference"):
            self.about += "; samples do not repeat (enable_deterministic_inference)"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Yield each group as soon as its last rollout is finished.

        A completion that SGLang aborted, or that is not what was asked for, is left out of its
        group and counted in `dropped`. Raises EngineDead, WeightsRefused (no complete weights) and
        RuntimeError (asleep).
        """
        self._require_ready()
        if self._shrunk:
            self._host.run(lambda engine: engine.resume_memory_occupation(["kv_cache"]))
            self._shrunk = False
        return self._groups(list(requests), sampling)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Send all weights, stamped with their version; wakes. See `Push.send`.

        named_tensors: names of transformers' model, each parameter exactly once. Raises
        WeightsRefused, then generation waits for a complete push; EngineDead.
        """
        self.wake()
        self._unready = f"the push of version {version} was refused or not finished"
        self.pushed = self._push.send(named_tensors, version, self.span)
        self._unready = ""

    def forget(self) -> None:
        """Drop the keys and values of earlier prompts, as a push does."""
        self._host.run(lambda engine: engine.flush_cache())

    def sleep(self) -> None:
        """Give the device's memory to others; without `keep_weights` the weights are gone."""
        self.check()
        if self._asleep:
            return
        if self._sleeps:
            self._host.run(lambda engine: engine.release_memory_occupation())
            torch.cuda.empty_cache()
            self._shrunk = True
            if not self._keeps:
                self._unready = "the weights were dropped by sleep()"
        self._asleep = True

    def wake(self) -> None:
        """Take back the memory of the weights; that of keys and values comes with `generate`."""
        self.check()
        if self._asleep and self._sleeps:
            torch.cuda.empty_cache()
            self._host.run(lambda engine: engine.resume_memory_occupation(_WOKEN_FIRST))
        self._asleep = False

    def check(self) -> None:
        """Raises EngineDead, with the reason, when the engine cannot go on."""
        self._host.check()

    def close(self) -> None:
        """End the engine's processes."""
        self._host.close()

    def _require_ready(self) -> None:
        self.check()
        if self._asleep:
            raise RuntimeError("the engine is asleep: call wake() before generate()")
        if self._unready:
            raise WeightsRefused(f"no complete weights to generate with: {self._unready}")

    def _groups(self, requests: list[Request], sampling: Sampling) -> Iterator[Group]:
        assembly = Assembly(requests)
        parameters = _parameters(sampling, self._stops, self._banned)

        def answers(engine: Any) -> AsyncIterator[tuple[Row, Mapping[str, Any] | str]]:
            return _answers(engine, requests, sampling, parameters, self._primes)

        for row, answer in self._host.stream(answers) if requests else ():
            rollout = self._rollout(requests[row.request], row.sample_id, sampling, answer)
            yield from assembly.add([(row, rollout)])

    def _rollout(
        self, request: Request, sample_id: int, sampling: Sampling, answer: Mapping[str, Any] | str
    ) -> Rollout | None:
        """The completion in an answer's meta_info; None, and counted, if it cannot be used."""
        problem = answer if isinstance(answer, str) else ""
        ids: list[int] = []
        logprobs: list[float] = []
        version = -1
        if not isinstance(answer, str):
            ids = [token for _, token, *_ in answer["output_token_logprobs"]]
            logprobs = [logprob for logprob, *_ in answer["output_token_logprobs"]]
            version = _version(answer["weight_version"])
            self.prompt_tokens += answer["prompt_tokens"]
            self.cached_tokens += answer["cached_tokens"]
            problem = self._problem(ids, logprobs, answer["finish_reason"], sampling)
        if problem:
            if problem not in self.dropped:
                _LOG.warning("a completion is left out: %s", problem)
            self.dropped[problem] += 1
            return None
        finish: FinishReason = "stop" if self._stopped(ids, sampling) else "length"
        return Rollout(request.prompt, request.group_key, sample_id, ids, logprobs, finish, version)

    def _stopped(self, ids: Sequence[int], sampling: Sampling) -> bool:
        """Whether it ended by itself; SGLang says "length" where that was at the limit."""
        if ids[-1] in self._stops:
            return True
        text = sampling.stop_text
        return bool(text) and text in self._decode(list(ids[-len(text) - 1 :]))

    def _problem(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        finish: Mapping[str, Any],
        sampling: Sampling,
    ) -> str:
        """What is wrong with a completion; "" if nothing is. Raises EngineDead: not finite."""
        if not all(map(math.isfinite, logprobs)):
            raise EngineDead("SGLang's logits are not finite")
        if finish["type"] not in ("stop", "length"):
            return f"SGLang ended it: {finish.get('message') or finish['type']}"
        if not ids or self._banned.intersection(ids):
            return "it is empty" if not ids else "it holds a banned token"
        if self._stops.intersection(ids[:-1]):
            return "it goes on after a stop token"
        if finish["type"] == "length" and len(ids) != sampling.max_new_tokens:
            return f"it was cut before {sampling.max_new_tokens} tokens"
        if finish["type"] == "stop" and not self._stopped(ids, sampling):
            return "it ended without a stop token"
        return ""


def rollout_launch(
    model: Path, device: str, *, most_requests: int, arguments: Mapping[str, object], **how: Any
) -> Launch:
    """How an engine for rollouts is started: no image features outlive a push of weights.

    most_requests: completions decoded at once; arguments: further server arguments, over ours;
    how: further fields of `Launch`.
    """
    ours: dict[str, object] = {"max_running_requests": most_requests, "weight_version": "0"}
    return Launch(model, device, arguments={**ours, **arguments}, environment=_ENVIRONMENT, **how)


def _parameters(
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


async def _answers(
    engine: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    parameters: dict[str, Any],
    primes: bool,
) -> AsyncIterator[tuple[Row, Mapping[str, Any] | str]]:
    """The meta_info of each sample as the engine finishes it, or why it took no such request.

    primes: a prompt of several samples passes once before they are asked for.
    """

    async def send(prompt: Prompt, **how: Any) -> Any:
        images = [{**prompt.images, "format": "processor_output"}] if prompt.images else None
        return await engine.async_generate(
            input_ids=prompt.input_ids.tolist(), image_data=images, **how
        )

    async def ask(row: Row) -> tuple[Row, Mapping[str, Any] | str]:
        prompt = requests[row.request].prompt
        seed = request_seed(sampling.seed, sampling.step, prompt.key, row.sample_id)
        try:
            if row.request in first:
                await first[row.request]
            given = {**parameters, "sampling_seed": seed}
            answer = await send(prompt, sampling_params=given, return_logprob=True)
        except ValueError as error:
            return row, f"refused by SGLang: {error}"
        return row, answer["meta_info"]

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


def _version(stamp: str) -> int:
    """The weight version of a stamp; -1, no version at all, for a stamp of somebody else's."""
    return int(stamp) if stamp.isdecimal() else -1


def _require_length(longest: int, info: Mapping[str, Any]) -> None:
    """Raises ValueError when `longest` tokens do not fit into the engine."""
    limit = int(info["max_req_input_len"])
    if longest > limit:
        raise ValueError(
            f"prompts and completions of up to {longest} tokens (data.max_prompt_tokens + "
            f"rollout.max_new_tokens), but the SGLang engine takes {limit}: its model's context, "
            f"or its memory for keys and values ({info['max_total_num_tokens']} tokens): lower "
            "the former, or raise rollout.memory"
        )
