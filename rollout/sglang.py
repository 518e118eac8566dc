"""The rollout engine on SGLang, in the trainer's own process and on its GPUs."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from speciarl.rollout.engine import (
    EngineDead,
    FinishReason,
    Group,
    Request,
    Rollout,
    Sampling,
    WeightsRefused,
)
from speciarl.rollout.sglang_checks import require_shareable_memory
from speciarl.rollout.sglang_launch import Host
from speciarl.rollout.sglang_memory import CACHE, WEIGHTS, DeviceMemory
from speciarl.rollout.sglang_push import Push, Pushed, Span, manifest_of, no_span
from speciarl.rollout.sglang_requests import Answer, samples, sampling_parameters
from speciarl.rollout.sglang_settings import Launch
from speciarl.rollout.waves import Assembly, Row

_LOG = logging.getLogger(__name__)
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
        self._asleep = False
        self._unready = ""
        manifest = manifest_of(launch.model)
        self._host = Host(launch)
        self._memory = DeviceMemory(self._host.run)
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
        self._memory.take(CACHE)
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
            self._memory.release()
            if not self._keeps:
                self._unready = "the weights were dropped by sleep()"
        self._asleep = True

    def wake(self) -> None:
        """Take back the memory of the weights; that of keys and values comes with `generate`."""
        self.check()
        self._memory.take(WEIGHTS)
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
        parameters = sampling_parameters(sampling, self._stops, self._banned)

        def answers(engine: Any) -> AsyncIterator[tuple[Row, Answer]]:
            return samples(engine, requests, sampling, parameters, self._primes)

        for row, answer in self._host.stream(answers) if requests else ():
            rollout = self._rollout(requests[row.request], row.sample_id, sampling, answer)
            yield from assembly.add([(row, rollout)])

    def _rollout(
        self, request: Request, sample_id: int, sampling: Sampling, answer: Answer
    ) -> Rollout | None:
        """The completion of an answer; None, and counted, if it cannot be used."""
        if isinstance(answer, str):
            self._drop(answer)
            return None
        ids = [token for _, token, *_ in answer["output_token_logprobs"]]
        logprobs = [logprob for logprob, *_ in answer["output_token_logprobs"]]
        self.prompt_tokens += answer["prompt_tokens"]
        self.cached_tokens += answer["cached_tokens"]
        if problem := self._problem(ids, logprobs, answer["finish_reason"]["type"], sampling):
            self._drop(problem)
            return None
        finish: FinishReason = "stop" if self._stopped(ids, sampling) else "length"
        version = _version(answer["weight_version"])
        return Rollout(request.prompt, request.group_key, sample_id, ids, logprobs, finish, version)

    def _drop(self, reason: str) -> None:
        """Counts a completion that cannot be used; the first for a reason is told."""
        if reason not in self.dropped:
            _LOG.warning("a completion is left out: %s", reason)
        self.dropped[reason] += 1

    def _stopped(self, ids: Sequence[int], sampling: Sampling) -> bool:
        """Whether it ended by itself; SGLang says "length" where that was at the limit."""
        if ids[-1] in self._stops:
            return True
        text = sampling.stop_text
        return bool(text) and text in self._decode(list(ids[-len(text) - 1 :]))

    def _problem(
        self, ids: Sequence[int], logprobs: Sequence[float], finish: str, sampling: Sampling
    ) -> str:
        """What is wrong with a completion; "" if nothing is. Raises EngineDead: not finite."""
        if not all(map(math.isfinite, logprobs)):
            raise EngineDead("SGLang's logits are not finite")
        if finish not in ("stop", "length"):
            return f"SGLang ended it: {finish}"
        if not ids or self._banned.intersection(ids):
            return "it is empty" if not ids else "it holds a banned token"
        if self._stops.intersection(ids[:-1]):
            return "it goes on after a stop token"
        if finish == "length" and len(ids) != sampling.max_new_tokens:
            return f"it was cut before {sampling.max_new_tokens} tokens"
        if finish == "stop" and not self._stopped(ids, sampling):
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
