"""A verdict is a classification: the six labels scored as the next token after the prompt.

A prompt is head + pair + tail, in ids. The head (instructions, examples) is the same for every pair
of a variant, so its keys and values are computed once. The pair is tokenized by itself: whatever an
answer holds, none of its tokens is one that the tokenizer calls special.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from speciarl.judge.base import Pair, Verdict
from speciarl.judge.prompt import DEFAULT_VARIANT, LABELS, messages, quoted, wording
from speciarl.kernels.codes import S_PLUS, W

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HERE = "PAIR-GOES-HERE"
# For templates that know them: no thinking before the label, and not another prompt every day.
_OPTIONS: dict[str, Any] = {"enable_thinking": False, "date_string": "1 January 2025"}
_PLAIN = "{system}\n\n{pair}\nLabel:"


class LabelPrompt:
    """The prompts of one variant for one tokenizer.

    head, tail: ids around the pair; labels: the id of each of LABELS after the tail.

    A tokenizer with a chat template gets the chat of `messages`; if the template knows no system
    role, or wants content in parts, it gets it that way. Without a template the layout is plain:
    begin-of-text where the tokenizer has one, the system text, an empty line, the pair, "Label:".
    Raises ValueError, naming the tokenizer, for an unknown variant, a template that does not place
    system text and pair once each, or labels that are not six single tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variant: str = DEFAULT_VARIANT) -> None:
        wording(variant)
        self._tokenizer = tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)
        text, lead = _rendered(tokenizer, variant)
        head, tail = text.split(_HERE)
        if tail.rstrip().endswith("<think>"):  # a model that always thinks: end it at once
            tail = tail.rstrip() + "\n\n</think>\n\n"
        self.head: tuple[int, ...] = tuple(self._encode(head))
        if tokenizer.chat_template is None and tokenizer.bos_token_id is not None:
            self.head = (tokenizer.bos_token_id, *self.head)
        self.tail, self.labels = self._label_tokens(tail, lead)

    def suffix(self, pair: Pair) -> list[int]:
        """Ids of the pair and the tail: what follows `head`."""
        ids = self._encode(quoted(pair.truth, pair.prediction))
        return [i for i in ids if i not in self._special] + list(self.tail)

    def digest(self) -> str:
        """A hash of all ids that no pair changes: tokenizer, template and wording in one."""
        return hashlib.sha256(repr((self.head, self.tail, self.labels)).encode()).hexdigest()[:12]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _label_tokens(self, tail: str, lead: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tail ids and label ids, with the first blank before the label that makes it one token."""
        for blank in dict.fromkeys((lead, "", " ", "\n")):
            rows = [self._encode(tail + blank + letter) for letter in LABELS]
            ids = tuple(row[-1] for row in rows if row)
            back = tuple(str(self._tokenizer.decode([i])).strip() for i in ids)
            if back == LABELS and len({tuple(row[:-1]) for row in rows}) == 1:
                return tuple(rows[0][:-1]), ids
        raise ValueError(
            f"tokenizer {self._tokenizer.name_or_path!r} has no single, distinct tokens for the "
            f"labels {', '.join(LABELS)} after {tail[-40:]!r}: it cannot judge by labels"
        )


def label_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of LABELS after the prompt of `tokenizer`: six single, distinct tokens.

    Raises ValueError naming the tokenizer and the labels if there are none.
    """
    return list(LabelPrompt(tokenizer).labels)


def _rendered(tokenizer: PreTrainedTokenizerBase, variant: str) -> tuple[str, str]:
    """The prompt's text with _HERE for the pair, and the blank that precedes an answer."""
    system = messages(Pair("", ""), variant)[0]["content"]
    if tokenizer.chat_template is None:
        return _PLAIN.format(system=system, pair=_HERE), " "
    for chat, answer in _layouts(system):
        try:
            text = _render(tokenizer, chat, add_generation_prompt=True)
            whole = _render(tokenizer, [*chat, answer], add_generation_prompt=False)
        except (TemplateError, TypeError):
            continue
        if text.count(_HERE) == 1 and text.count(system) == 1:
            lead = whole.removeprefix(text).partition(LABELS[0])[0]
            return text, lead if whole.startswith(text) and not lead.strip() else ""
    raise ValueError(
        f"the chat template of tokenizer {tokenizer.name_or_path!r} does not place a system text "
        "and a user text once each, with or without a system role"
    )


def _layouts(system: str) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Chats, and an answer, in the forms that templates take: the usual one first."""
    apart = [("system", system), ("user", _HERE)]
    for turns in (apart, [("user", f"{system}\n\n{_HERE}")]):
        for parts in (False, True):
            *chat, answer = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
                for role, text in [*turns, ("assistant", LABELS[0])]
            ]
            yield chat, answer


def _render(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt, **_OPTIONS
    )
    return str(text)


def verdict_of(scores: Sequence[float], source: str, variant: str = DEFAULT_VARIANT) -> Verdict:
    """The verdict that the scores of LABELS give: the likeliest category, the lower one of equals.

    scores: six logits or log-probabilities in nats, in the order of LABELS; -inf is a label that
    was not scored. margin: best over runner-up in nats, None if only one was scored.
    probabilities: softmax over the six, in the order of the ladder. Scores that are NaN, +inf or
    all -inf are no verdict: category None, source "no-label". Raises ValueError for other than six
    scores.
    """
    codes = wording(variant).codes
    if len(scores) != len(codes):
        raise ValueError(f"{len(scores)} scores for the {len(codes)} labels {', '.join(LABELS)}")
    by_code = dict(zip(codes, map(float, scores), strict=True))
    ladder = [by_code[code] for code in range(W, S_PLUS + 1)]
    best = max(ladder)
    if not math.isfinite(best) or any(map(math.isnan, ladder)):
        return Verdict(None, "no-label")
    exponentials = [math.exp(score - best) for score in ladder]
    total = sum(exponentials)
    category = ladder.index(best)
    runner_up = max(ladder[:category] + ladder[category + 1 :])
    margin = best - runner_up if math.isfinite(runner_up) else None
    return Verdict(category + W, source, margin, tuple(e / total for e in exponentials))
