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
from speciarl.rollout.waves import Row, distinct_prompts

_KEEP_SHARE = 0.75
"""Rows are compacted when at most this share of them still runs."""


@dataclass(frozen=True)
class Decoder:
    """What every wave of one `generate` shares."""

    model: Any
    device: torch.device
    stops: np.ndarray
    """[V] bool: tokens that end a completion."""
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
    """Rows decoded together, one token each per `advance`."""

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
        self.batch = np.arange(len(rows))  # the rows in the batch, finished ones not yet dropped
        self.alive = np.ones(len(rows), dtype=bool)  # which of the batch still run
        self.length = 0
        self._prefill()

    @property
    def running(self) -> bool:
        return bool(self.alive.any())

    @torch.inference_mode()
    def _prefill(self) -> None:
        decoder = self.decoder
        prompts = distinct_prompts(self.requests[row.request] for row in self.rows)
        place = {id(prompt): index for index, prompt in enumerate(prompts)}
        owner = np.array([place[id(self.requests[row.request].prompt)] for row in self.rows])
        lengths = [len(prompt.input_ids) for prompt in prompts]
        self.cache = GroupCache(lengths, self.sampling.max_new_tokens, decoder.device)
        last = []
        for part in chunks(lengths, decoder.prefill_tokens):
            self.cache.place(part.start)
            inputs = language_inputs(decoder.model, prompts[part], decoder.device)
            ends = torch.tensor(lengths[part], device=decoder.device) - 1
            hidden = self._forward(**inputs)
            last.append(hidden[torch.arange(len(ends), device=decoder.device), ends])
        self.cache.open(owner, decoder.query_heads)
        by_row = torch.from_numpy(owner).to(decoder.device)
        self.logits = decoder.model.get_output_embeddings()(torch.cat(last)).index_select(0, by_row)
        first = torch.tensor([prompt.next_position for prompt in prompts], device=decoder.device)
        self.positions = first.index_select(0, by_row)
        if decoder.fused is not None:
            longest = max(prompt.next_position for prompt in prompts)
            self.tables = decoder.fused.tables(longest + self.sampling.max_new_tokens)

    def _forward(self, **inputs: Any) -> Tensor:
        """Hidden states [B, l, H] after the last norm, by transformers' layers."""
        language = self.decoder.model.model.language_model
        output = language(**inputs, use_cache=False, group_cache=self.cache)
        return output.last_hidden_state

    @torch.inference_mode()
    def advance(self) -> list[tuple[Row, Rollout]]:
        """One more token for every row; returns the rows that it finished.

        Raises EngineDead when the logits of a row are not finite.
        """
        decoder = self.decoder
        if self.length > 0:
            self._feed()
        ids, logprobs = choose(
            self.logits, self.sampling, self.uniforms[:, self.length], decoder.banned
        )
        self.ids = ids
        tokens, chances = torch.stack([ids.double(), logprobs.double()]).cpu().numpy()
        if not np.isfinite(chances[self.alive]).all():
            raise EngineDead(f"logits are not finite at version {decoder.version}")
        self.tokens[self.batch, self.length] = tokens
        self.logprobs[self.batch, self.length] = chances
        self.length += 1
        stopped = decoder.stops[self.tokens[self.batch, self.length - 1]]
        over = self.alive & (stopped | (self.length == self.sampling.max_new_tokens))
        self.alive &= ~over
        return [self._finished(self.batch[i], bool(stopped[i])) for i in np.flatnonzero(over)]

    def _feed(self) -> None:
        """Drop rows where it pays, then run the last tokens through the model: next logits."""
        if self.alive.sum() <= _KEEP_SHARE * len(self.alive):
            self._compact()
        decoder = self.decoder
        embeds = decoder.model.get_input_embeddings()(self.ids)
        positions = self.positions + (self.length - 1)
        if decoder.fused is not None:
            hidden = decoder.fused(embeds, positions, self.tables, self.cache)
        else:
            grid = text_positions(decoder.model, positions[:, None].expand(3, -1, -1))
            hidden = self._forward(inputs_embeds=embeds[:, None], position_ids=grid)[:, 0]
        self.cache.advance()
        self.logits = decoder.model.get_output_embeddings()(hidden)

    def _compact(self) -> None:
        keep = np.flatnonzero(self.alive)
        rows = torch.from_numpy(keep).to(self.decoder.device)
        self.cache.keep(keep)
        self.ids, self.positions = self.ids[rows], self.positions[rows]
        self.uniforms = self.uniforms[rows]
        self.batch, self.alive = self.batch[keep], self.alive[keep]

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
