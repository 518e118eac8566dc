"""Completions that end at a text, such as `</answer>`, which no single token need be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ANSWER_END = "</answer>"

_UNSEEN, _HOLDS = -1, 1


class TextStop:
    """Tells which completions end with their newest token.

    One ends when the decoded text of its last `window` tokens contains the text: what SGLang does
    for `stop_regex=re.escape(text)` (0.5.17 to 0.5.23, schedule_batch.Req). So a text may be missed
    of which one character took several tokens.
    Cheap after every token: only samples whose newest token holds the text's last character are
    decoded. A text that ends in a blank or outside ASCII costs a decode per sample and token: there
    a token's own text does not show what it adds.
    """

    def __init__(self, text: str, decode: Callable[[list[int]], str], vocabulary: int) -> None:
        """decode: the tokenizer's, special tokens kept. vocabulary: number of ids.

        Raises ValueError for an empty text.
        """
        if not text:
            raise ValueError("a completion cannot end at an empty text")
        self.text = text
        self.window = len(text) + 1
        self._decode = decode
        self._last = text[-1]
        shows = self._last.isascii() and not self._last.isspace()
        self._holds = np.full(vocabulary, _UNSEEN if shows else _HOLDS, dtype=np.int8)
        """[V]: whether a token holds the last character; found out when it is first drawn."""

    def ended(self, tails: np.ndarray) -> np.ndarray:
        """[S] bool for the last tokens of each sample, [S, up to `window`] int64."""
        newest = tails[:, -1]
        for token in np.unique(newest[self._holds[newest] == _UNSEEN]).tolist():
            self._holds[token] = self._last in self._decode([token])
        ended = self._holds[newest] == _HOLDS
        for row in np.flatnonzero(ended).tolist():
            ended[row] = self.text in self._decode(tails[row].tolist())
        return ended
