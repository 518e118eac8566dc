"""The OpenAI chat protocol as a judge uses it: what is sent, and the verdict in what comes back.

Servers differ in how they constrain an answer and in whether they return log-probabilities, and
many ignore what they do not know: vLLM 0.12 and later drop `guided_choice` silently. So what a
server can do is found out by asking (server_probe.py), never by its name or version.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speciarl.judge.base import Verdict
from speciarl.judge.http_retry import Fault
from speciarl.judge.labels import verdict_of
from speciarl.judge.prompt import LABELS, category_of

SOURCE = "model"
TOPS = (20, 5)
"""How many log-probabilities are asked for: the most that OpenAI and vLLM give, then fewer."""
_SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": list(LABELS)}},
    "required": ["label"],
    "additionalProperties": False,
}
GUIDES: Mapping[str, Mapping[str, Any]] = {
    "structured_outputs": {"structured_outputs": {"choice": list(LABELS)}},  # vLLM from 0.11
    "guided_choice": {"guided_choice": list(LABELS)},  # vLLM before 0.12
    "regex": {"regex": f"({'|'.join(LABELS)})"},  # SGLang
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "label", "strict": True, "schema": _SCHEMA},
        }
    },  # OpenAI and most others
}
"""Fields that hold the answer to the labels, by name, the most direct first."""
SPOKEN = 4  # tokens: a letter, and enough more to see that it is not alone
OBJECT = 24  # tokens of {"label": "A"}, however it is spaced


@dataclass(frozen=True)
class Plan:
    """How this server is asked.

    top: log-probabilities wanted, 0 for none. guide: one of GUIDES, or "". system: whether its
    template takes a system text. silent: whether its template must be told not to think.
    """

    top: int = TOPS[0]
    guide: str = ""
    system: bool = True
    silent: bool = False

    def body(self, model: str, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The JSON of a request for one label after `messages`."""
        chat = list(messages)
        if not self.system:
            text = "\n\n".join(message["content"] for message in messages)
            chat = [{"role": "user", "content": text}]
        body: dict[str, Any] = {
            "model": model,
            "messages": chat,
            "temperature": 0,
            "max_tokens": OBJECT if self.guide == "json_schema" else 1 if self.top else SPOKEN,
        }
        if self.top:
            body |= {"logprobs": True, "top_logprobs": self.top}
        if self.guide:
            body |= GUIDES[self.guide]
        if self.silent:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        return body


def verdict_in(reply: Any, variant: str) -> Verdict:
    """The verdict that a completion holds: by log-probabilities, else by its text.

    Raises Fault "garbage" for what is no completion, "no-label" for one without a label.
    """
    choice = _choice(reply)
    scores = label_scores(choice)
    if scores is not None:
        return verdict_of(scores, SOURCE, variant)
    text = _text(choice)
    letter = label_in(text)
    if letter is None:
        raise Fault("no-label", repr(text[:80]), retry=True, outage=False)
    return Verdict(category_of(letter, variant), SOURCE)


def text_of(reply: Any) -> str:
    """The text of a completion, "" where it has none. Raises Fault "garbage"."""
    return _text(_choice(reply))


def has_logprobs(reply: Any) -> bool:
    """Whether a completion lists the likeliest first tokens. Raises Fault "garbage"."""
    return bool(_first_token(_choice(reply)))


def label_in(text: str) -> str | None:
    """The one label that `text` is: bare, quoted, before a period, or as {"label": ...}."""
    text = text.strip()
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except ValueError:
            return None
        label = content.get("label") if len(content) == 1 else None
        return label if label in LABELS else None
    bare = text.removesuffix(".").strip("\"'`")
    return bare if bare in LABELS else None


def label_scores(choice: Mapping[str, Any]) -> list[float] | None:
    """Log-probabilities of LABELS as the first token; None where none of them is listed.

    Tokens that differ in blanks only ("A", " A") are one label. A label that is not listed is no
    likelier than the least that is: it counts as just below, so the margin is a lower bound.
    """
    listed = _first_token(choice)
    found: dict[str, float] = {}
    for token, score in listed.items():
        letter = token.strip()
        if letter in LABELS:
            found[letter] = _sum(found.get(letter, -math.inf), score)
    if not found:
        return None
    below = min(listed.values()) - 1e-6
    return [found.get(letter, below) for letter in LABELS]


def _sum(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))


def _choice(reply: Any) -> Mapping[str, Any]:
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise Fault("garbage", "no choices in the answer", retry=True, outage=True)
    return choices[0]


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, str) else ""


def _first_token(choice: Mapping[str, Any]) -> dict[str, float]:
    """Token -> log-probability of what is listed for the first token, sampled one included."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], Mapping):
        return {}
    top = content[0].get("top_logprobs")
    if not isinstance(top, list) or not top:
        return {}
    found: dict[str, float] = {}
    for entry in [*top, content[0]]:
        token = entry.get("token") if isinstance(entry, Mapping) else None
        score = entry.get("logprob") if isinstance(entry, Mapping) else None
        if isinstance(token, str) and isinstance(score, (int, float)) and math.isfinite(score):
            found[token] = float(score)
    return found
