"""From a completion to its answer, and from an answer to forms in which names can be compared.

Nothing here erases a separator: comma, slash, semicolon, "or", "and", line break or spaced dash
stay in the text, so "robin/cardinal" can never come to equal a name. A whole text is compared
with whole names; whoever wants to know whether it lists several names asks `split_options` after.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

_TAGS = re.compile(r"</?answer>")
_THINK_TAG = re.compile(r"</?think>")

_ACCENTS = re.compile(r"[\u0300-\u036f]")
_APOSTROPHES = re.compile(r"['\u2018\u2019\u02bc]")
_GLUED_HYPHENS = re.compile(r"(?<=[\w.])[-\u2010\u2011\u2012\u2013](?=\w)")
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\u0085\u2028\u2029]\s*")
_BLANKS = re.compile(r"[^\S\n]+")
_SURROUNDING = ' \n."\u201c\u201d'
_ARTICLE = re.compile(r"(?:an?|the) (?=\S)")
_PLURAL_OF_CAPITAL = re.compile(r"(?<=[A-Z])s(?=[ .]*$)")  # "Gulfstream IVs", "F-16A/Bs"
_SEPARATORS = re.compile(
    r"\s*(?:[,;/|\\&+>\n\u2014\u2192]|(?:(?<=\s)[-\u2013](?=\s))|\b(?:or|and|vs|versus|maybe)\b)\s*"
)

# Longest suffix first; each plural ending with the singular endings it may stand for. A wrong
# candidate ("ros" from "roses") costs nothing: it only counts if it is somebody's name.
_PLURAL_ENDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("geese", ("goose",)),
    ("teeth", ("tooth",)),
    ("mice", ("mouse",)),
    ("feet", ("foot",)),
    ("ies", ("y", "ie")),
    ("ves", ("f", "fe", "ve")),
    ("men", ("man",)),
    ("ss", ()),
    ("es", ("", "e")),
    ("ae", ("a",)),
    ("s", ("",)),
    ("i", ("us",)),
)
_SHORTEST_PLURAL = 4  # "tits" and "emus" are plurals, the car "TTS" is not

_ABSTENTIONS = (
    "none",
    "abstain",
    "unknown",
    "unsure",
    "uncertain",
    "unclear",
    "undetermined",
    "unidentified",
    "unidentifiable",
    "not sure",
    "not certain",
    "no idea",
    "no answer",
    "n/a",
    "none of the above",
    "not identifiable",
    "I don't know",
    "I do not know",
    "don't know",
    "do not know",
    "I have no idea",
    "I'm not sure",
    "I am not sure",
    "I'm unsure",
    "I am unsure",
    "cannot say",
    "can't say",
    "cannot be determined",
    "cannot be identified",
    *(
        f"{subject}{modal} {verb}"
        for subject in ("", "I ")
        for modal in ("cannot", "can not", "can't", "am unable to", "unable to")
        for verb in ("tell", "determine", "identify", "classify")
    ),
)


def parse_answer(text: str) -> str | None:
    """The text between `<answer>` and `</answer>`, stripped; "" when nothing is between them.

    None is a format failure: anything but exactly one opening tag followed by exactly one closing
    tag, wherever they stand, or a think tag inside the answer. The rest of the completion is free
    text: `<think>` is neither demanded nor interpreted, so tags inside it count like any other.
    Tags are lower case without blanks, as the prompt shows them (SpeciaRL, section 3).
    """
    tags = list(_TAGS.finditer(text))
    if [tag.group() for tag in tags] != ["<answer>", "</answer>"]:
        return None
    answer = text[tags[0].end() : tags[1].start()]
    return None if _THINK_TAG.search(answer) else answer.strip()


def plain(text: str) -> str:
    """Case, accents, apostrophes, underscores and blanks levelled; hyphens still there."""
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
        text = unicodedata.normalize("NFC", _ACCENTS.sub("", text))
    text = _APOSTROPHES.sub("", text).replace("_", " ")
    return _BLANKS.sub(" ", _LINE_BREAKS.sub("\n", text)).strip(_SURROUNDING)


def normalise(text: str) -> str:
    """`text` without what never tells two names apart, and with every separator in place.

    Levelled: case, accents, apostrophes, underscores, hyphens between word characters (to a
    blank), runs of blanks, and blanks, periods and double quotes around the whole.
    """
    return _GLUED_HYPHENS.sub(" ", plain(text))


def key_of(text: str) -> str:
    """The key under which a name is indexed: `normalise` without blanks.

    So "golden-rod", "golden rod" and "goldenrod" are one name, and "F/A-18" keeps its slash.
    """
    return normalise(text).replace(" ", "")


@lru_cache(maxsize=1 << 14)
def singulars(word: str) -> tuple[str, ...]:
    """What `word` may be the plural of; () for short words and for what is no plural."""
    if word.endswith("s") and word[-2:-1].isdigit():  # "Cessna 172s"
        return (word[:-1],)
    if len(word) < _SHORTEST_PLURAL or not word.isalpha():
        return ()
    for ending, replacements in _PLURAL_ENDINGS:
        if word.endswith(ending):
            return tuple(word.removesuffix(ending) + replacement for replacement in replacements)
    return ()


def forms(text: str) -> Iterator[str]:
    """Keys that `text` may be known by, the most literal first.

    The key itself; without a leading article ("A 300" is an aircraft, so only after the literal
    text, and "A-10" has no article); then each with one word made singular, any one word:
    "birds of paradise" and "Brewer's Blackbird" (a plural, once its apostrophe is gone) need it.
    A small s after a final capital is a plural too, where case shows it: "IVs", but not "TTS".
    """
    whole = plain(text)
    bases = [whole]
    if article := _ARTICLE.match(whole):
        bases.append(whole[article.end() :])
    spaced = [_GLUED_HYPHENS.sub(" ", base) for base in bases]
    yield from (base.replace(" ", "") for base in spaced)
    for base in spaced:
        words = base.split(" ")
        for position, word in enumerate(words):
            for singular in singulars(word):
                yield "".join([*words[:position], singular, *words[position + 1 :]])
    if _PLURAL_OF_CAPITAL.search(text):
        yield from (base.replace(" ", "")[:-1] for base in spaced)


def split_options(text: str) -> list[str]:
    """The parts of `text` between separators; one part, the text, when it has none.

    A separator alone proves nothing ("Fish and chips", "F/A-18"): compare the whole text with the
    known names first.
    """
    return [part for part in _SEPARATORS.split(plain(text)) if part]


ABSTENTIONS = frozenset(key_of(phrase) for phrase in _ABSTENTIONS)


def is_abstention(text: str) -> bool:
    """Whether the whole text declines to answer, as the prompt allows: "None", "I don't know"."""
    return key_of(text) in ABSTENTIONS
