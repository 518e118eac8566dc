"""The native engine: transformers' own model, decoded by this package's loop.

Every prompt passes the model once and its samples share its keys and values; all samples of many
prompts are decoded together; finished samples leave the batch. A sample depends on the weights,
its prompt and its name alone (up to rounding), not on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speciarl.rollout.cache import ATTENTION
from speciarl.rollout.decode import Decoder, Wave
from speciarl.rollout.engine import EngineDead, Group, Request, Sampling, WeightsRefused
from speciarl.rollout.fused import FusedText, supports
from speciarl.rollout.stops import TextStop
from speciarl.rollout.waves import Assembly, plan_waves
from speciarl.rollout.weights import copy_weights

ROUTES = ("auto", "fused", "generic")


class NativeEngine:
    """A RolloutEngine over one model in this process.

    Args:
        model: a transformers image-text model on its device (Qwen2.5-VL, Qwen3-VL). The engine
            owns it: its language model gets the engine's attention and serves nothing else.
        stop_ids: tokens that end a completion.
        banned_ids: tokens never sampled and masked in the log-probs (image and video
            placeholders: one of them in a completion breaks the next forward).
        decode: the tokenizer's, special tokens kept; needed for `Sampling.stop_text`.
        max_rows: completions decoded at once; bounds the memory of keys and values.
        prefill_tokens: padded prompt tokens in one forward.
        route: how tokens are decoded: "fused" (`FusedText`), "generic" (transformers' layers), or
            "auto", which is fused where that is supported.
        keep_weights: whether `sleep` keeps a copy of the weights on the host; without it they
            are dropped, and generation waits for `load_weights`.

    Raises ValueError for a model without a language model of its own or impossible settings.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int],
        decode: Callable[[list[int]], str] | None = None,
        max_rows: int = 256,
        prefill_tokens: int = 16384,
        route: str = "auto",
        keep_weights: bool = True,
    ) -> None:
        if not hasattr(getattr(model, "model", None), "language_model"):
            raise ValueError(f"{type(model).__name__} has no model.language_model to decode with")
        if max_rows < 1 or prefill_tokens < 1:
            raise ValueError(f"max_rows={max_rows}, prefill_tokens={prefill_tokens}: at least 1")
        if route not in ROUTES:
            raise ValueError(f"route={route!r}: one of {', '.join(ROUTES)}")
        language = model.model.language_model
        if route == "fused" and not supports(language):
            raise ValueError(f"route=fused does not know {type(language).__name__}")
        self.ranks = 1
        self.model = model.eval().requires_grad_(False)
        language.set_attn_implementation(ATTENTION)
        self.device = model.get_input_embeddings().weight.device
        vocabulary = model.get_output_embeddings().weight.shape[0]
        outside = [i for i in (*stop_ids, *banned_ids) if not 0 <= i < vocabulary]
        if outside:
            raise ValueError(f"ids {outside} are outside the vocabulary of {vocabulary}")
        self.decode = decode
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.keep_weights = keep_weights
        self.weight_version = 0
        self._stops = np.zeros(vocabulary, dtype=bool)
        self._stops[list(stop_ids)] = True
        self._banned = torch.tensor(sorted(set(banned_ids)), dtype=torch.long, device=self.device)
        self._fuses = route == "fused" or (route == "auto" and supports(language))
        self._fused = FusedText(language) if self._fuses else None
        self.about = f"native engine, {'fused' if self._fuses else 'generic'} route"
        self._text_stop: TextStop | None = None
        self._shapes: list[torch.Size] = []
        self._loads = 0
        self._asleep = False
        self._unready = ""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Yield each group as soon as its last rollout is finished.

        Raises EngineDead (closed, logits not finite), WeightsRefused (no complete weights),
        RuntimeError (asleep, or weights pushed while it runs), and ValueError (a stop text, and no
        decode to find it with).
        """
        self._assert_ready()
        return self._groups(list(requests), sampling, self._stop_at(sampling.stop_text))

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copy all parameters in place, cast to the engine's dtype; wakes. See `copy_weights`.

        named_tensors: names of the model's `state_dict()`, each parameter exactly once; of tied
        names one is enough. Raises WeightsRefused; then generation waits for a complete push.
        """
        self.wake()
        self._loads += 1
        self._unready = f"the push of version {version} was refused or not finished"
        copy_weights(self.model, named_tensors)
        self.weight_version = version
        self._unready = ""

    def sleep(self) -> None:
        """Give the device's memory to others: weights move to the host, or are dropped."""
        self.check()
        if self._asleep:
            return
        self._asleep, self._fused = True, None
        if self.keep_weights:
            self.model.to("cpu")
        else:
            self._shapes = [parameter.shape for parameter in self.model.parameters()]
            for parameter in self.model.parameters():
                parameter.data = parameter.data.new_empty(0)
            self._unready = "the weights were dropped by sleep()"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take the memory back; dropped weights stay undefined until `load_weights`."""
        self.check()
        if not self._asleep:
            return
        if self.keep_weights:
            self.model.to(self.device)
        for parameter, shape in zip(self.model.parameters(), self._shapes, strict=False):
            parameter.data = parameter.data.new_empty(shape)
        self._asleep, self._shapes = False, []
        if self._fuses:
            self._fused = FusedText(self.model.model.language_model)

    def check(self) -> None:
        """Raises EngineDead after `close`."""
        if self.model is None:
            raise EngineDead("the engine is closed")

    def close(self) -> None:
        """Let go of the model."""
        self.model = self._fused = None

    def _assert_ready(self) -> None:
        self.check()
        if self._asleep:
            raise RuntimeError("the engine is asleep: call wake() before generate()")
        if self._unready:
            raise WeightsRefused(f"no complete weights to generate with: {self._unready}")

    def _stop_at(self, text: str) -> TextStop | None:
        if not text:
            return None
        if self.decode is None:
            raise ValueError(
                f"sampling.stop_text = {text!r}: the native engine was made without `decode`"
            )
        if self._text_stop is None or self._text_stop.text != text:
            self._text_stop = TextStop(text, self.decode, len(self._stops))
        return self._text_stop

    def _groups(
        self, requests: list[Request], sampling: Sampling, text_stop: TextStop | None
    ) -> Iterator[Group]:
        decoder = Decoder(
            model=self.model,
            device=self.device,
            stops=self._stops,
            text_stop=text_stop,
            banned=self._banned,
            fused=self._fused,
            prefill_tokens=self.prefill_tokens,
            version=self.weight_version,
        )
        assembly, loads = Assembly(requests), self._loads
        for rows in plan_waves(requests, self.max_rows):
            self._assert_unchanged(loads)
            wave = Wave(decoder, requests, rows, sampling)
            while wave.running:
                self._assert_unchanged(loads)
                yield from assembly.add(wave.advance())

    def _assert_unchanged(self, loads: int) -> None:
        """The caller had the floor at the last yield: is the engine as it was?"""
        self._assert_ready()
        if loads != self._loads:
            raise RuntimeError("weights were pushed while completions were generated")
