"""When a text offers several names, and when it only looks like it.

A separator proves nothing by itself: "Fish and chips", "F/A-18" and "Black-and-white Warbler" are
names. Known names decide: what equals one as a whole is one name, and two of them side by side are
two options. Without known names only what no name contains is proof ("or", ">", a path of slashes);
all the rest is for a judge that knows the world ("surf and turf", "Chrysler/Dodge Caravan").
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from speciarl.judge.answers import ABSTENTIONS, forms, key_of, plain, singulars
from speciarl.judge.guard import visible

_Find = Callable[[str], str | None]
_NOTHING = "none"
MOST_MARKS = 12  # separators; a text with more is a list, whatever it lists

# What a reader cannot tell from a Latin letter, where normal forms leave it alone: Cyrillic, Greek,
# Armenian, small capitals, letters in boxes and flags.
_LOOKS = (
    ("АаВвЕеКкМмНнОоРрСсТтХхУуІіЈјЅѕԁһӏԛԝҮү", "aabbeekkmmhhooppccttxxyyiijjssdhlqwyy"),
    ("ΑαΒΕΖΗΙιΚκΜΝνΟοΡρΤΥυΧχγ", "aabezhiikkmnvoopptyuxxy"),
    ("օոսհıɑɡłøđʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "onuhiaglodbcdefghijklmnoprstuvwyz"),
)
_LATIN = str.maketrans({a: b for odd, usual in _LOOKS for a, b in zip(odd, usual, strict=True)})
_SIGNS = str.maketrans(
    {first + i: chr(ord("a") + i) for first in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)}
    | dict.fromkeys(map(ord, "\u2044\u2215\u29f8\u2571\u27cb"), "/")
    | dict.fromkeys(map(ord, "\u00a6\u2223\u2502\u2758\u01c0"), "|")
    | dict.fromkeys(map(ord, "\u060c\u201a\u3001\ua4f9\u1363"), ",")
    | dict.fromkeys(map(ord, "\u037e\u061b\u204f"), ";")
    | dict.fromkeys(map(ord, "\u203a\u276f\u1433\u2192\u21d2"), ">")
)
_ODD_WORD = re.compile(r"\w*[^\W\x00-\x7f]\w*")

_SYMBOL = "\u2190-\u21ff\u2500-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff"  # emoji, arrows
_QUOTES = "\"'`\u00ab\u00b4\u00bb\u2018-\u201f"
_END = rf"[\s.,:;!?*_~()\[\]\-\u2013\u2014\u2022{_QUOTES}{_SYMBOL}]+"
_ENDS = re.compile(rf"^(?:{_END}|#)+|{_END}$")
_AMPERSAND = re.compile(r"\s*&\s*")
_INITIALS = re.compile(r"(?<![^\W\d_])([^\W\d_])/([^\W\d_])(?=s?(?![^\W\d_]))")


def level(text: str) -> str:
    """`text` as a reader sees it, for comparing; case and separators stay.

    Gone: what is not visible, and punctuation and symbols around the whole. Letters that look
    Latin become so where that makes a whole word Latin. "&" is "and".
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", visible(text)).translate(_SIGNS)
        text = _ODD_WORD.sub(_latin, text)
    text = _ENDS.sub("", text)
    return _AMPERSAND.sub(" and ", text) if "&" in text else text


def _latin(word: re.Match[str]) -> str:
    latin = word.group().translate(_LATIN)
    return latin if latin.isascii() else word.group()


@lru_cache(maxsize=1 << 15)
def keys(text: str) -> tuple[str, ...]:
    """Keys that the levelled `text` may be known by, the most literal first; () for no word.

    Last come those without a slash between two letters, which folder names cannot have: "F/A-18"
    is "F-A-18", "C/V" is "C-V". No other separator is ever left out.
    """
    text = level(text)
    found = [*forms(text)]
    if "/" in text:
        found += forms(_INITIALS.sub(r"\1\2", text))
    return tuple(dict.fromkeys(key for key in found if key))


def _own(text: str) -> str:
    """The key by which a known name goes: one for "F/A-18" and "FA-18"."""
    return key_of(_INITIALS.sub(r"\1\2", level(text)))


class Names:
    """Known names by their keys. Immutable, so any number of threads may ask it."""

    def __init__(self, names: Iterable[str]) -> None:
        self.texts = tuple(dict.fromkeys(names))  # as given
        self._literal = {keys(text)[0]: _own(text) for text in self.texts if keys(text)}
        self._derived: dict[str, str | None] = {}
        self._heads: set[str] = set()
        for text in self.texts:
            own = _own(text)
            for key in keys(text):
                if key not in self._literal and self._derived.setdefault(key, own) != own:
                    self._derived[key] = None  # fits several, so none
            if head := _head(text):
                self._heads.add(head)

    @property
    def known(self) -> frozenset[str]:
        """The keys of all names, as they are written."""
        return frozenset(self._literal)

    def find(self, text: str) -> str | None:
        """The key of the one name that the whole of `text` is, up to its forms; None if none."""
        return self.find_keys(keys(text))

    def find_keys(self, candidates: Sequence[str]) -> str | None:
        """`find` for the `keys` of a text."""
        for index in (self._literal, self._derived):
            for key in candidates:
                if (name := index.get(key)) is not None:
                    return name
        return None

    def head(self, text: str) -> str | None:
        """The key of `text` if it is what a name ends in: "robin" where "American Robin" is known.

        A known name of several words is its own head.
        """
        head = _head(text)
        return head if head in self._heads and " " not in plain(level(text)) else self.find(text)


@lru_cache(maxsize=1 << 12)
def _alone(truth: str) -> Names:
    return Names((truth,))


def _head(text: str) -> str | None:
    """The key of the last word of `text`, in the singular; None for what is no word of letters."""
    word = key_of(level(text).rpartition(" ")[2])
    if not word.isalpha() or len(word) < 3:
        return None
    return min((word, *singulars(word)), key=len)


# Between two names; "e", "y", "et" and others are "and" elsewhere, and count only between names.
_AND = (
    "and|und|et|y|e|och|plus|then|but|also|maybe|perhaps|possibly|probably|likely|could be"
    "|might be|may be|could also be|might also be|may also be|instead of|rather than|x|и|ve|i"
)
_OR = (
    r"or|either|vs|versus|oder|ou|eller|albo|lub|oppure|veya|atau|hoặc|или|либо|або|ή|أو|או"
    r"|such as|e\.g\.|eg|for example|for instance|alternatively|otherwise"
)
_AND_SIGN = r"和|与|與|と|や|및|و|\u00d7"  # the last in hybrids: "Iris × germanica"
_OR_SIGN = r"或者|还是|還是|或|または|それとも|もしくは|あるいは|또는|혹은|아니면"
# In no name: a path, a column, a choice. A mark is only ever found between two other parts.
_PATH_SIGN = r"[>|;\\\u00bb\u2190-\u21ff]|::|=>"
_LIST_SIGN = rf"[,/+~!?\n\u00b7\u2022\u2023\u2043\u3001\u3002{_SYMBOL}]|\.(?=\s|\.)|\d\s*%"
_DASH = r"(?<=\s)[-\u2010-\u2015](?=\s)|\u2014"
_NUMBER = r"(?:(?<=\s)|(?<=^))\(?\d{1,2}[.)](?=\s)"


def _folded(words: str) -> str:
    return "|".join(plain(word) if "\\" not in word else word for word in words.split("|"))


_MARK = re.compile(
    rf"\s*(?:(?P<strong>{_PATH_SIGN}|{_OR_SIGN}|(?<![\w-])(?:{_folded(_OR)})(?![\w-]))"
    rf"|(?P<list>{_LIST_SIGN}|{_DASH}|{_NUMBER})"
    rf"|(?P<weak>{_AND_SIGN}|(?<![\w-])(?:{_folded(_AND)})(?![\w-])))\s*"
)
_MARK_WORDS = frozenset(word.split(" ")[0] for word in f"{_AND}|{_OR}".split("|"))
_MAYBE_MARK = re.compile(r"[^\w\s'-]|\s[-\u2010-\u2015]\s|\n|[^\x00-\x7f]")
_WORD_SLASH = re.compile(r"[^\W\d_]{3}\s*/\s*[^\W\d_]{3}")
_FILLER = re.compile(
    r"^(?:(?:both|either|neither|nor|not|maybe|perhaps|possibly|probably|likely|also|else|rather"
    r"|some|kind|kinds|type|types|sort|of|like|is|its|it|this|that|i|think|between|first|second"
    r"|third|my|guess|if|wrong|a|an|the)\b\s*)+|\s*\b(?:too|also|maybe|perhaps|both|instead)$"
)


def offers_several(text: str, names: Names, truth: str) -> bool:
    """Whether `text`, levelled and plain, certainly holds several options.

    To be asked only if the whole is no known name. names: the known names, besides `truth`.
    Certain are: two different known names side by side, also shortened ("Black-footed or Laysan
    Albatross"); an "or", a path or column sign, or two slashes outside a known name; a list by
    signs of which every item is a known name or its last word ("robin/cardinal"). A refusal counts
    as a name there: "robin/none".
    """
    if _MARK_WORDS.isdisjoint(text.split()) and not _MAYBE_MARK.search(text):
        return False  # most answers, for a tenth of the time
    sources = (names, _alone(truth))

    def find(text: str) -> str | None:
        if key_of(text) in ABSTENTIONS:
            return _NOTHING
        return next((name for source in sources if (name := source.find(text))), None)

    def head(text: str) -> str | None:
        return next((name for source in sources if (name := source.head(text))), None)

    marks = list(_MARK.finditer(text))
    if len(marks) > MOST_MARKS:
        return True
    edges = [0, *(edge for mark in marks for edge in mark.span()), len(text)]
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    kept = [i for i, (start, end) in enumerate(spans) if start < end]
    if len(kept) < 2:
        return False
    parts = [spans[i] for i in kept]
    if _is_inverted(text, parts, find):
        return False
    between = [marks[a:b] for a, b in zip(kept, kept[1:], strict=False)]
    found, piece = _pieces(text, parts, find)
    if len(set(found)) > 1:
        return True
    open_marks = [
        mark
        for i, group in enumerate(between)
        if piece[i] is None or piece[i] != piece[i + 1]
        for mark in group
    ]
    if any(mark["strong"] for mark in open_marks):
        return True
    if sum(_is_path(text, mark) for mark in open_marks) > 1:
        return True
    items = [_FILLER.sub("", text[start:end]) for start, end in parts]
    if all(mark["list"] for group in between for mark in group):
        heads = [head(item) for item in items]
        if all(heads) and len(set(heads)) > 1:
            return True
    return any(_shortened(a, b, find) for a, b in zip(items, items[1:], strict=False))


def _is_inverted(text: str, parts: Sequence[tuple[int, int]], find: _Find) -> bool:
    """Whether `text` is a known name as an index lists it: "Jay, Blue"."""
    if len(parts) != 2 or text[parts[0][1] : parts[1][0]].strip() != ",":
        return False
    last, first = (text[start:end] for start, end in parts)
    return find(f"{first} {last}") is not None


def _is_path(text: str, mark: re.Match[str]) -> bool:
    """Whether a mark is a slash between words: in "bird/robin", but not in "F/A-18" or "5/6"."""
    return "/" in mark.group() and bool(_WORD_SLASH.match(text, max(mark.start() - 3, 0)))


def _pieces(
    text: str, parts: Sequence[tuple[int, int]], find: _Find
) -> tuple[list[str], list[int | None]]:
    """The known names in `text`, each over one or more parts, longest first; of which is a part."""
    names: list[str] = []
    piece: list[int | None] = [None] * len(parts)
    for size in range(len(parts), 0, -1):
        for first in range(len(parts) - size + 1):
            run = range(first, first + size)
            if any(piece[i] is not None for i in run):
                continue
            start, end = parts[first][0], parts[run[-1]][1]
            found = find(text[start:end]) or find(_FILLER.sub("", text[start:end]))
            if found is not None:
                for i in run:
                    piece[i] = len(names)
                names.append(found)
    return names, piece


def _shortened(left: str, right: str, find: _Find) -> bool:
    """Whether two parts share words written once: "Black-footed or Laysan Albatross"."""
    if not (left and right):  # nothing but filler: "Mallard Duck, I think"
        return False
    before, after = left.split(" "), right.split(" ")
    lefts = {find(left), *(find(" ".join([left, *after[i:]])) for i in range(1, len(after)))}
    rights = {find(right), *(find(" ".join([*before[:i], right])) for i in range(1, len(before)))}
    lefts.discard(None)
    rights.discard(None)
    return bool(lefts) and bool(rights) and len(lefts | rights) > 1
