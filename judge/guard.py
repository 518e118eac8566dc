"""What of an answer may reach a prompt: visible text without power over it.

An answer is data. It must neither end the prompt, nor speak as the system, nor hide anything from
a reader of the prompt. `neutralise` makes it so for every chat format at once; JSON quotes it then.
"""

import re
import unicodedata
from collections.abc import Iterable

LONGEST = 200
"""Characters of an answer that a judge sees; class names of the usual data sets have under 60."""
_RAW = 16 * LONGEST  # what is looked at: normalising marks takes quadratic time, spaces are folded
CUT = "…"
BREAK = "·"

# Letters, symbols and marks that show nothing, besides the categories below: joiner, fillers,
# vowel inherents, Mongolian and emoji variation selectors, the blank Braille pattern.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
_GONE = {"Cc", "Cf", "Cs", "Co", "Cn"}  # control, format (bidi, zero-width, tags), surrogate, ...
_BLANK = {"Zs", "Zl", "Zp"}
_BREAKS = "\n\v\f\r\x85\u2028\u2029"


# Control tokens of all families stand in brackets: <|im_end|>, </s>, [INST], <<SYS>>,
# <start_of_turn>, <think>. A tokenizer may fold wide forms before it looks for them, so these are
# all characters that some normal form turns into one with < or [, > or ].
_OPENING = re.compile("([<[\u226e\ufe47\ufe64\uff1c\uff3b])")
_CLOSING = re.compile("([]>\u226f\ufe48\ufe65\uff1e\uff3d])")
_HASHES = re.compile(r"#(?=#)")  # "### Instruction"
_ROLE = re.compile(
    r"\b(system|user|assistant|human|ai|bot|model|developer|tool|instructions?|input|output"
    r"|response|question|answer|label|grade|pair|ground_truth|prediction)\b(\s*[:\uff1a])",
    re.IGNORECASE,
)


def visible(text: str) -> str:
    """`text` in NFC without what shows nothing: control, format (bidirectional, zero-width, tag),
    private and unassigned characters, lone surrogates, fillers. Blanks are spaces, line breaks \\n.
    """
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if char in _BREAKS:
            kept.append("\n")
        elif category in _BLANK or char == "\t":
            kept.append(" ")
        elif category not in _GONE:
            kept.append(char)
    return unicodedata.normalize("NFC", _UNSEEN.sub("", "".join(kept)))


def neutralise(text: str, limit: int = LONGEST) -> str:
    """`text` as a single line of at most `limit` visible characters, free of control tokens.

    Control, format (bidirectional, zero-width, tag), private and unassigned characters, invisible
    fillers and lone surrogates go; line breaks and blanks become single spaces; the result is NFC.
    A middle dot splits what chat templates are made of: brackets from what they hold
    ("<·|im_end|·>", "[·INST·]"), "#·#", and role words from their colon ("system·:"). A cut ends in
    "…". Letters are left alone: homoglyphs and words are for the reader to judge.
    Raises ValueError for a limit under 1.
    """
    if limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    seen = visible(text[:_RAW])
    seen = _OPENING.sub(rf"\1{BREAK}", seen)
    seen = _CLOSING.sub(rf"{BREAK}\1", seen)
    seen = _HASHES.sub(f"#{BREAK}", seen)
    seen = _ROLE.sub(rf"\1{BREAK}\2", seen)
    seen = " ".join(seen.split())
    if len(seen) > limit or len(text) > _RAW:
        seen = seen[: limit - 1].rstrip() + CUT
    return seen


def require_labels(truths: Iterable[str]) -> None:
    """Raises ValueError for labels that are empty, or longer than a judge sees."""
    for truth in dict.fromkeys(truths):
        if not neutralise(truth):
            raise ValueError(f"a label is empty, no answer can be judged against it: {truth!r}")
        if len(truth) > LONGEST:
            raise ValueError(
                f"a label has {len(truth)} characters, the judge sees {LONGEST}: {truth[:60]!r}"
            )
