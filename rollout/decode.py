"""Decoding of one wave: prompts once, then one token per row and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speciarl.rollout.cache import GroupCache
from speciarl.rollout.engine import EngineDead, Request, Rollout, Sampling
from speciarl.rollout.fused import FusedText
from speciarl.rollout.prefill import chunks, language_inputs, text_positions
from speciarl.rollout.sampling import choose
from speciarl.rollout.seeds import uniform_rows
from speciarl.rollout.stops import TextStop
from speciarl.rollout.waves import Row, distinct_prompts

_KEEP_SHARE = 0.75
"""Rows are dropped when at most this share of them still has samples."""


@dataclass(frozen=True)
class Decoder:
    """What every wave of one `generate` shares."""

    model: Any
    device: torch.device
    stops: np.ndarray
    """[V] bool: tokens that end a completion."""
    text_stop: TextStop | None
    banned: Tensor
    """[K] int64 on the device."""
    fused: FusedText | None
    """Runs the decoding steps; None: transformers' own layers do."""
    prefill_tokens: int
    """Padded prompt tokens in one forward."""
    version: int
    """Of the weights."""

    @property
    def query_heads(self) -> int:
        return int(self.model.config.get_text_config().num_attention_heads)


class Wave:
    """Samples decoded together, one token each per `advance`.

    The batch has a row per distinct beginning: samples of a prompt share a row as long as they
    agree, and the row forks where they part. Finished samples leave at once, rows without samples
    when that pays.
    """

    def __init__(
        self, decoder: Decoder, requests: Sequence[Request], rows: list[Row], sampling: Sampling
    ) -> None:
        self.decoder = decoder
        self.requests = requests
        self.rows = rows
        self.sampling = sampling
        names = [(requests[row.request].prompt.key, row.sample_id) for row in rows]
        shape = (len(rows), sampling.max_new_tokens)
        uniforms = uniform_rows(sampling.seed, sampling.step, names, shape[1])
        self.uniforms = torch.from_numpy(uniforms).to(decoder.device)
        self.tokens = np.zeros(shape, dtype=np.int64)
        self.logprobs = np.zeros(shape, dtype=np.float32)
        self.length = 0
        self.live = np.arange(len(rows))
        """Samples that still run."""
        self.branch = np.zeros(len(rows), dtype=np.int64)
        """The batch row of each live sample."""
        self._prefill()

    @property
    def running(self) -> bool:
        return len(self.live) > 0

    @torch.inference_mode()
    def _prefill(self) -> None:
        decoder = self.decoder
        prompts = distinct_prompts(self.requests[row.request] for row in self.rows)
        place = {id(prompt): index for index, prompt in enumerate(prompts)}
        self.branch = np.array([place[id(self.requests[row.request].prompt)] for row in self.rows])
        lengths = [len(prompt.input_ids) for prompt in prompts]
        self.cache = GroupCache(lengths, self.sampling.max_new_tokens, decoder.device)
        last = []
        for part in chunks(lengths, decoder.prefill_tokens):
            self.cache.place(part.start)
            inputs = language_inputs(decoder.model, prompts[part], decoder.device)
            ends = torch.tensor(lengths[part], device=decoder.device) - 1
            hidden = self._forward(**inputs)
            last.append(hidden[torch.arange(len(ends), device=decoder.device), ends])
        self.cache.open(decoder.query_heads, int(np.bincount(self.branch).max()))
        self.logits = decoder.model.get_output_embeddings()(torch.cat(last))
        first = [prompt.next_position for prompt in prompts]
        self.positions = torch.tensor(first, device=decoder.device)
        if decoder.fused is not None:
            self.tables = decoder.fused.tables(max(first) + self.sampling.max_new_tokens)

    def _forward(self, **inputs: Any) -> Tensor:
        """Hidden states [B, l, H] after the last norm, by transformers' layers."""
        language = self.decoder.model.model.language_model
        output = language(**inputs, use_cache=False, group_cache=self.cache)
        return output.last_hidden_state

    @torch.inference_mode()
    def advance(self) -> list[tuple[Row, Rollout]]:
        """One more token for every live sample; returns the samples that it finished.

        Raises EngineDead when the logits of a sample are not finite.
        """
        decoder, now = self.decoder, self.length
        if now > 0:
            self._feed()
        uniforms = self.uniforms[:, now].index_select(0, self._to_device(self.live))
        apart = np.array_equal(self.branch, np.arange(len(self.logits)))
        rows = None if apart else self._to_device(self.branch)
        chosen = choose(self.logits, self.sampling, uniforms, decoder.banned, rows)
        tokens, logprobs = torch.stack([part.double() for part in chosen]).cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise EngineDead(f"logits are not finite at version {decoder.version}")
        self.tokens[self.live, now] = tokens
        self.logprobs[self.live, now] = logprobs
        self.length += 1
        stopped = decoder.stops[self.tokens[self.live, now]]
        if decoder.text_stop is not None:
            since = max(0, self.length - decoder.text_stop.window)
            stopped |= decoder.text_stop.ended(self.tokens[self.live, since : self.length])
        over = stopped | (self.length == self.sampling.max_new_tokens)
        ended = zip(self.live[over].tolist(), stopped[over].tolist(), strict=True)
        finished = [self._finished(index, stop) for index, stop in ended]
        self.live, self.branch = self.live[~over], self.branch[~over]
        return finished

    def _feed(self) -> None:
        """Fork and drop rows, then run the last tokens through the model: next logits."""
        decoder, count = self.decoder, len(self.positions)
        vocabulary = len(decoder.stops)
        pairs = self.branch * vocabulary + self.tokens[self.live, self.length - 1]
        pairs, branch = np.unique(pairs, return_inverse=True)
        parents, ids = np.divmod(pairs, vocabulary)
        if (np.diff(parents) == 0).any() or len(parents) <= _KEEP_SHARE * count:
            self.cache.select(parents)
            self.positions = self.positions.index_select(0, self._to_device(parents))
            self.branch = branch
        else:  # nothing parts; rows that no sample needs any more just run along
            whole = np.zeros(count, dtype=np.int64)
            whole[parents] = ids
            ids = whole
        embeds = decoder.model.get_input_embeddings()(self._to_device(ids))
        positions = self.positions + (self.length - 1)
        if decoder.fused is not None:
            hidden = decoder.fused(embeds, positions, self.tables, self.cache)
        else:
            grid = text_positions(decoder.model, positions[:, None].expand(3, -1, -1))
            hidden = self._forward(inputs_embeds=embeds[:, None], position_ids=grid)[:, 0]
        self.cache.advance()
        self.logits = decoder.model.get_output_embeddings()(hidden)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.decoder.device)

    def _finished(self, index: int, stopped: bool) -> tuple[Row, Rollout]:
        row = self.rows[index]
        request = self.requests[row.request]
        return row, Rollout(
            prompt=request.prompt,
            group_key=request.group_key,
            sample_id=row.sample_id,
            ids=self.tokens[index, : self.length].tolist(),
            logprobs=self.logprobs[index, : self.length].tolist(),
            finish_reason="stop" if stopped else "length",
            weight_version=self.decoder.version,
        )
