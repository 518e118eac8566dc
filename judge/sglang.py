"""The judge on SGLang, in this process: label scores from one prefill of each pair's few tokens."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from speciarl.judge.base import Pair, Verdict, in_order
from speciarl.judge.guard import LONGEST, require_labels
from speciarl.judge.labels import LabelPrompt, verdict_of
from speciarl.judge.modelfile import device_of, digest_of, dtype_of, find_model
from speciarl.judge.prompt import DEFAULT_VARIANT, prompt_id
from speciarl.judge.tally import Tally
from speciarl.rollout.engine import EngineDead
from speciarl.rollout.sglang_launch import Host
from speciarl.rollout.sglang_requests import answer_of, as_finished
from speciarl.rollout.sglang_settings import Launch

SOURCE = "model"
_LOG = logging.getLogger(__name__)
_ROOM = 65_536  # tokens: the instructions once, and the pairs of a step
_LONGEST_PAIR = Pair("word " * (LONGEST // 5), "word " * (LONGEST // 5))


class SglangJudge:
    """Kind "sglang": an engine of its own on the trainer's GPUs, asleep while others use them.

    The instructions stay in the engine's prefix cache from the first pair on; each further pair
    costs its own tokens. Asleep on a CUDA device, the weights wait on the host and the rest is
    freed; on a CPU sleeping does nothing. When the engine dies, pairs without a verdict are faults,
    the reason is logged once, and `check` raises it: the run goes on without verdicts.
    `Verdict.source` is "model", or the reason of a fault.
    """

    concurrent = False

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        variant: str = DEFAULT_VARIANT,
        dtype: str = "auto",
        device: str = "auto",
        memory: float = 0.0,
        arguments: Mapping[str, object] | None = None,
    ) -> None:
        """Starts the engine, and sees that it scores the labels.

        model: folder in HF layout, or a name on the hub. variant: of prompt.VARIANTS.
        dtype: auto (bf16 on CUDA, fp32 on a CPU, SGLang's choice for quantized weights), float32,
        bfloat16, float16.
        memory: share of the GPU memory free at start, 0 is SGLang's choice; whatever shares the GPU
        must sleep then, or start later. arguments: further server arguments of SGLang, such
        as tp_size, quantization, attention_backend; see `Launch`.
        Raises what `Host` raises, FileNotFoundError, or ValueError naming the setting, the
        tokenizer without single-token labels, or the context that is too short.
        """
        arguments = dict(arguments or {})
        if ":" in device:
            raise ValueError(
                f"judge device {device!r}: an SGLang judge is on its rank's own GPU; use cuda"
            )
        folder = find_model(model)
        place = device_of(device)
        self._prompt = LabelPrompt(AutoTokenizer.from_pretrained(folder), variant)
        self._variant, self._tally = variant, Tally()
        self._lock, self._awake = threading.Lock(), True
        for name in ("model_calls", "cached_tokens", "queue_seconds"):
            self._tally.add(name, 0.0)
        if dtype != "auto" or not _quantized(folder, arguments):
            dtype = str(dtype_of(dtype, place)).removeprefix("torch.")
        self.identity = ":".join(
            ("sglang", Path(model).name, digest_of(folder), dtype, *_precision(arguments),
             prompt_id(variant), self._prompt.digest())
        )  # fmt: skip
        self._sleeps = place.type == "cuda"
        if not self._sleeps:
            _LOG.info("the SGLang judge is on a CPU: it keeps its memory when it sleeps")
        self._host = Host(
            Launch(
                folder,
                place.type,
                dtype=dtype,
                memory=memory,
                sleeps=self._sleeps,
                keep_weights=True,
                arguments={"max_total_tokens": _ROOM, **arguments},
            )
        )
        try:
            self._probe(str(model))
        except BaseException:
            self._host.close()
            raise
        _LOG.info("judge %s on %s", self.identity, self._host.features.describe())

    def check(self, truths: Iterable[str]) -> None:
        """Raises ValueError for labels that are empty, or longer than a judge sees; EngineDead."""
        self._host.check()
        require_labels(truths)

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order. Thread-safe. Raises RuntimeError when asleep."""
        return in_order(len(pairs), self.grade_each(pairs))

    def grade_each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) of every pair as the engine answers."""
        if not self._awake:
            raise RuntimeError(f"judge {self.identity} is asleep or closed: wake it to grade")
        pending = set(range(len(pairs)))
        prompts = [[*self._prompt.head, *self._prompt.suffix(pair)] for pair in pairs]
        asked = time.perf_counter()

        async def answers(engine: Any) -> AsyncIterator[tuple[int, Any]]:
            self._tally.add("queue_seconds", len(prompts) * (time.perf_counter() - asked))
            async for answer in _answers(engine, prompts, self._prompt.labels):
                yield answer

        try:
            for index, answer in self._host.stream(answers) if prompts else ():
                pending.remove(index)
                yield index, self._verdict(answer)
        except EngineDead as error:  # logged by the host, once
            for index in sorted(pending):
                yield index, Verdict(None, str(error))

    def tally(self) -> dict[str, float]:
        """model_calls (pairs that the model scored), cached_tokens (of their prompts, found in the
        prefix cache), queue_seconds (pairs waiting for other threads' pairs)."""
        return self._tally.snapshot()

    def sleep(self) -> None:
        """GPU memory is freed, the weights stay on the host."""
        with self._lock:
            if self._awake and self._sleeps:
                self._try(lambda engine: engine.release_memory_occupation())
                self._awake = False

    def wake(self) -> None:
        """Weights and room for keys and values are on the GPU again; the prefix cache is empty."""
        with self._lock:
            if not self._awake and self._sleeps:
                self._try(lambda engine: engine.resume_memory_occupation())
                self._awake = True

    def close(self) -> None:
        """Ends the engine; the judge is not used afterwards."""
        with self._lock:
            self._awake = self._sleeps = False
            self._host.close()

    def _try(self, job: Any) -> None:
        try:
            self._host.run(job)
        except EngineDead:  # logged by the host; the pairs that follow are faults
            pass

    def _verdict(self, answer: Any) -> Verdict:
        if isinstance(answer, str):
            return Verdict(None, answer)
        scores, cached = answer
        self._tally.add("model_calls")
        self._tally.add("cached_tokens", cached)
        return verdict_of(scores, SOURCE, self._variant)

    def _probe(self, model: str) -> None:
        """Raises ValueError if the longest pair gets no verdict."""
        (_, verdict), *_ = self.grade_each([_LONGEST_PAIR])
        self._host.check()
        if verdict.category is None:
            length = len(self._prompt.head) + len(self._prompt.suffix(_LONGEST_PAIR))
            raise ValueError(
                f"judge model {model!r} on SGLang does not score the labels after a prompt of "
                f"{length} tokens (instructions and a pair of {2 * LONGEST} characters): "
                f"{verdict.source}"
            )


def _quantized(folder: Path, arguments: Mapping[str, object]) -> bool:
    """Whether the weights are quantized, as stored or on loading."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "quantization" in arguments or "quantization_config" in config


def _precision(arguments: Mapping[str, object]) -> list[str]:
    """Those server arguments on which scores depend beyond rounding, for the identity."""
    names = ("quantization", "kv_cache_dtype", "json_model_override_args")
    return [f"{name}={arguments[name]}" for name in names if name in arguments]


async def _answers(
    engine: Any, prompts: Sequence[Sequence[int]], labels: Sequence[int]
) -> AsyncIterator[tuple[int, Any]]:
    """(index, answer) of each prompt as the engine answers: scores and number of cached tokens, or
    the reason why there are none."""

    async def ask(index: int) -> tuple[int, Any]:
        answer = await answer_of(
            engine,
            input_ids=list(prompts[index]),
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=-1,
            token_ids_logprob=list(labels),
        )
        return index, answer if isinstance(answer, str) else _scores(answer, labels)

    yield await ask(0)  # alone: those that follow find the instructions in the prefix cache
    async for answer in as_finished(map(ask, range(1, len(prompts)))):
        yield answer


def _scores(meta: Mapping[str, Any], labels: Sequence[int]) -> tuple[list[float], int] | str:
    """Log-probabilities of the labels and the number of cached tokens, or what went wrong."""
    if meta["finish_reason"]["type"] != "length":
        return f"SGLang ended the request: {meta['finish_reason']}"
    by_id = {token: score for score, token, *_ in meta["output_token_ids_logprobs"][0]}
    return [float(by_id[label]) for label in labels], int(meta["cached_tokens"])
