"""The judge in this process: a language model of transformers that scores the six labels."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from speciarl.judge.base import Pair, Verdict, in_order
from speciarl.judge.guard import LONGEST, require_labels
from speciarl.judge.labels import LabelPrompt, verdict_of
from speciarl.judge.modelfile import device_of, digest_of, dtype_of, find_model, load_model
from speciarl.judge.prompt import DEFAULT_VARIANT, prompt_id
from speciarl.judge.scorer import LabelScorer
from speciarl.judge.tally import Tally

SOURCE = "model"
_PROBES = (Pair("Scarlet Tanager", "bird"), Pair("rose", "None"), Pair("Boeing 747-400", "B747"))
# Weights of judges that are open: those of one model with several wordings have them in common.
_LOADED: WeakValueDictionary[tuple[object, ...], LabelScorer] = WeakValueDictionary()
_LOADING = threading.Lock()
_LONGEST_PAIR = Pair("word " * (LONGEST // 5), "word " * (LONGEST // 5))


class TransformersJudge:
    """Kind "transformers": batched, no server, any machine; a verdict is one forward of its pair.

    A verdict does not depend on the batch it was in, nor on the order of pairs. On a CPU, or on a
    CUDA device that is not this process's own, it grades while others generate (`concurrent`); on
    the process's own CUDA device its weights leave the device between `sleep` and `wake`. Judges of
    one model with different wordings share its weights.
    `Verdict.source` is "model", or of a fault: too-long (for the model's context), out-of-memory
    (for this one pair), no-label (its scores are not finite).
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        variant: str = DEFAULT_VARIANT,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "auto",
        token_budget: int = 65_536,
    ) -> None:
        """Loads the model, and sees that it can judge.

        model: folder in HF layout, or a name on the hub. variant: of prompt.VARIANTS.
        dtype: auto (bf16 on CUDA, else fp32), float32, bfloat16, float16.
        attention: auto, or an attention of transformers. token_budget: tokens of a batch,
        rows x (instructions + pair); halved whenever a CUDA device runs out of memory.
        Raises FileNotFoundError, MemoryError, or ValueError naming the setting, the tokenizer
        without single-token labels, or the context that is too short.
        """
        if token_budget < 1:
            raise ValueError(f"judge token_budget = {token_budget}: must be at least 1")
        self._device = device_of(device)
        kind = dtype_of(dtype, self._device)
        folder = find_model(model)
        self._prompt = LabelPrompt(AutoTokenizer.from_pretrained(model), variant)
        longest = len(self._prompt.head) + len(self._prompt.suffix(_LONGEST_PAIR))
        self._context = _context(AutoConfig.from_pretrained(model), longest, str(model))
        self._scorer: LabelScorer | None = _scorer(
            model, folder, (kind, self._device, attention), self._prompt
        )
        self._variant, self._budget, self._tally = variant, token_budget, Tally()
        for name in ("pairs", "faults", "model_calls", "batches", "queue_seconds"):
            self._tally.add(name, 0.0)
        self.concurrent = self._device.type != "cuda" or (
            self._device.index != torch.cuda.current_device()
        )
        self.identity = ":".join(
            ("transformers", Path(model).name, digest_of(folder), str(kind).removeprefix("torch."),
             prompt_id(variant), self._prompt.digest())
        )  # fmt: skip

    def check(self, truths: Iterable[str]) -> None:
        """Raises ValueError for labels that are empty, or longer than a judge sees."""
        require_labels(truths)

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order. Thread-safe. Raises RuntimeError when asleep."""
        return in_order(len(pairs), self.grade_each(pairs))

    def grade_each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) of every pair as batches end, the longest pairs first."""
        asked = time.perf_counter()
        self._tally.add("pairs", len(pairs))
        with self._turn():
            suffixes = [self._prompt.suffix(pair) for pair in pairs]
        head = len(self._prompt.head)
        pending = sorted(range(len(pairs)), key=lambda i: -len(suffixes[i]))
        while pending and head + len(suffixes[pending[0]]) > self._context:
            yield pending.pop(0), self._counted(Verdict(None, "too-long"))
        while pending:
            width = head + len(suffixes[pending[0]])
            rows = max(1, self._budget // width)
            batch = pending[:rows]
            scores = self._scores([suffixes[i] for i in batch], asked)
            if scores is None and len(batch) > 1:
                self._budget = min(self._budget, width * (len(batch) // 2))
                continue
            pending = pending[rows:]
            if scores is None:
                yield batch[0], self._counted(Verdict(None, "out-of-memory"))
                continue
            for i, row in zip(batch, scores.tolist(), strict=True):
                yield i, self._counted(verdict_of(row, SOURCE, self._variant))

    def tally(self) -> dict[str, float]:
        """`Judge.tally`; "model_calls" are pairs that the model scored, in "batches"."""
        return self._tally.snapshot()

    def sleep(self) -> None:
        """Weights off the device, if it is the process's own CUDA device."""
        if self._scorer is not None and not self.concurrent:
            with self._scorer.lock:
                self._scorer.sleep()

    def wake(self) -> None:
        """Weights on the device again."""
        if self._scorer is not None:
            with self._scorer.lock:
                self._scorer.wake()

    def close(self) -> None:
        """Releases the weights, unless another judge has them; this one is not used afterwards."""
        self._scorer = None
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def _turn(self) -> Iterator[LabelScorer]:
        """Tokenizer and model, for one thread at a time."""
        scorer = self._scorer
        if scorer is None:
            raise RuntimeError(f"judge {self.identity} is closed")
        with scorer.lock:
            if not scorer.awake:
                raise RuntimeError(f"judge {self.identity} is asleep: wake it to grade")
            yield scorer

    def _scores(self, suffixes: list[list[int]], asked: float) -> Tensor | None:
        """[B, labels] of a batch, None where the device has no room for it."""
        with self._turn() as scorer:
            waited = time.perf_counter() - asked
            try:
                scores = scorer.scores(self._prompt.head, suffixes)
            except torch.OutOfMemoryError:
                scores = None
            if scores is None:  # not above: there the error still holds the tensors
                torch.cuda.empty_cache()
                return None
            self._tally.add("model_calls", len(suffixes))
            self._tally.add("batches")
            self._tally.add("queue_seconds", waited * len(suffixes))
            return scores

    def _counted(self, verdict: Verdict) -> Verdict:
        if verdict.category is None:
            self._tally.add("faults")
        return verdict


def _scorer(
    model: str | PathLike[str],
    folder: Path,
    place: tuple[torch.dtype, torch.device, str],
    prompt: LabelPrompt,
) -> LabelScorer:
    """The model with the labels of `prompt`; the one that another judge has, if it is the same."""
    key = (folder.resolve(), place, prompt.labels)
    with _LOADING:
        scorer = _LOADED.get(key)
        if scorer is None:
            scorer = LabelScorer(load_model(model, *place), prompt.labels)
            scorer.verify(prompt.head, [prompt.suffix(pair) for pair in _PROBES])
            _LOADED[key] = scorer
        return scorer


def _context(config: Any, needed: int, model: str) -> int:
    """Tokens that the model has positions for."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if needed > context:
        raise ValueError(
            f"judge model {model!r} has a context of {context} tokens, and the instructions with a "
            f"pair of {2 * LONGEST} characters take {needed}: use a model with a longer context"
        )
    return int(context)
