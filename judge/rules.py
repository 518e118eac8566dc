"""What needs no model: answers that rules decide, before any judge sees them.

S: the truth itself, up to article, case, number, hyphens, accents, look-alike letters and what is
not visible. A: a refusal. W: nothing; several options (hedges.py); what speaks to the judge rather
than names a thing; what is too long to be a name. All else goes on. A text that is a known name as
a whole is never W by rule. W is given only where it is certain: a doubt goes to the inner judge.

A path ("animal > bird > robin") is W: three answers of three rungs at once, of which the judge
would have to choose one; as a single label it is malformed. Only a name that is so written is not.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from speciarl.judge.answers import ABSTENTIONS, key_of, plain
from speciarl.judge.base import Judge, Pair, Verdict, Wrapper, in_order
from speciarl.judge.base import each as each_verdict
from speciarl.judge.guard import LONGEST, visible
from speciarl.judge.hedges import Names, keys, level, offers_several
from speciarl.kernels.codes import A, S, W

VERSION = 2  # part of the identity: raise it when a rule changes a verdict
_CACHED = 1 << 16  # rulings kept; a run of 165 steps asks some 100,000 pairs, mostly repeated

# What grades or agrees instead of naming, as whole answers.
_LABELS = frozenset(
    key_of(label)
    for label in (
        *("wrong", "incorrect", "generic", "less specific", "specific", "more specific", "exact"),
        *("correct", "right", "true", "yes", "ok", "same", "the same", "equal", "exact match"),
        *("synonym", "vague", "error", "s plus", "s minus", "prediction", "ground truth", "truth"),
        *("label", "answer", "category", "approved", "accepted", "ditto", "idem", "as above"),
        *(
            "see above",
            "same thing",
            "same species",
            "target",
            "exacto",
            "genau",
            "oui",
            "да",
            "是",
            "对",
        ),
    )
)
_LABEL_SIGN = re.compile(r"[a-z0-9]|[a-gsw] ?[+-]|[a-gsw][+-]?(?:\s*[,/;|<> ]\s*[a-gsw][+-]?)+")
_WORD = re.compile(r"[^\W_]")

# Never part of a name, as plain() writes it: lower case, no accents or apostrophes. A first net: it
# holds the phrases that judges are known to fall for, and the prompt of the inner judge the rest.
_WORDS = (
    r"generic|spe[cz]ifi|disregard|overrid|verdict|truth\b|predict(?:ion|ed)|in?correct"
    r"|correct|jailbreak|pretend (?:that|this|it|the|all)\b|regardless\b|whatever\b|whichever\b"
    r"|anything\b|please\b"
    r"|you(?:r|rs|ll|re|ve)?\b(?! tiao\b)|respon[ds]|reply\b|output|prompts?\b|assistant\b"
    r"|chatgpt\b|llms?\b|language model|as an ai\b|json\b|evalua"
    r"|(?<!motor )(?<!road )grad(?:er|ing)\b|synonym|identical\b|equivalent\b"
    r"|equals?\b|reward|abstain|(?:mark|count)(?:ed|s)? as\b|classif(?:y|ied|ies)\b|ignor"
    r"|instru[ckz]|anweisung|corret|korrekt|richtig|[ck]ategor|reponds|antwort|bewert|dimentica"
    r"|olvida|oublie|vergiss|vergeet|zignoruj|pomin|veredicto|abaikan|bo qua\b|spelling\b"
    r"|(?:the|one|only|a) letter\b|letter of\b"
    r"|(?:judge|judges|judged|judging|score|grade|rate|label|treat|accept|consider)"
    r" (?:it|this|that|me|my|the|as|all|every|any|must|should|is)\b|(?:the|dear|hey|note to) judge"
    r"|(?:this|true|gold|target|expected|accepted) (?:label|answer|class)\b|(?:depicted|other) "
    r"(?:field|object)\b|reference\b|aforementioned|rubric|lenient|approve\b|trust me\b"
    r"|(?:score|rating|final|result|match)\s*:|\d+ ?/ ?10\b"
    r"|(?:full|maximum|max|top|best|highest|uppermost|high|perfect) "
    r"(?:marks?|scores?|credit|points?|grades?|ratings?|tiers?|rung|label|category|possible)\b"
    r"|(?:must|should) be (?:label|grad|judg|scor|rat|mark|given|accept|treat|consider|count)"
    r"|(?:all|the|everything) above\b|(?:previous|prior|preceding|earlier|above|system) "
    r"(?:text|message|rule|prompt|task|context|order|turn|conversation)"
    r"|forget (?:all|about|any|every|everything|the|what|previous|prior|above)\b"
    r"|(?:is|are|was|always) (?:\w+ )?"
    r"(?:right|true|valid|accurate|perfect|best|fine|ok|okay)\b(?! \w)"
    r"|(?:matches|means|same as) (?:the|it|all|any|exact)"
    r"|(?:system|user|assistant|human|ai|developer|judge|grader)\s*[\n:]"
    r"|(?:answer|label|letter|option|choice|grade|print|return|choose|select|pick|say|write|rung)"
    r"\b\W{0,3}(?:(?:is|with|as|the|letter|only)\W{0,3})*[a-f]\W*$"
)
_SIGNS = (
    r"[<{}`\\=]|->|\[/?(?:inst|sys|system|user|end|begin|s)\b|\"\s*[,:]\s*\"|[,:]\s*\"|#{2,}|-{3,}"
    r"|~{3,}|%[sd]\b|\$\w|https?:|www\.|\beval\(|\bprint\(|\(\s*[a-f]\s*\)|^[a-f]\s*[):]"
)
_ELSEWHERE = (
    "忽略|忽视|无视|無視|忘记|指令|指示|正确|正確|正解|正答|分类|类别|分類|具体|评分|评判|評価|採点|裁判"
    "|判定|以上|答案|回答|игнор|инструк|правильн|верныи|конкретн|оцен|забуд|ответ|категори|судь"
    "|تجاهل|تعليمات|صحيح|محدد|تقييم|अनदेखा|निर्देश|सही|विशिष्ट|무시|지시|정답|구체|판정|התעלם|הוראות"
)
_SPOKEN_WORDS = re.compile(rf"(?<!\w)(?:{_WORDS})")
_SPOKEN_SIGNS = re.compile(f"{_SIGNS}|{_ELSEWHERE}")
_ODD = re.compile(r"[^a-z0-9\s,'.-]|--|->|www")  # without any there are no such signs
_RUN_TOGETHER = re.compile(
    r"ignore(?:the|all|any|previous|above|your)|disregard|instruction|groundtruth|specific"
)
_NO_LETTER = re.compile(r"[\W_]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")


class RuleJudge(Wrapper):
    """Answers by rule what it can, and asks `inner` for the rest. Thread-safe.

    `Verdict.source` is rule-name (S), rule-abstain (A), rule-empty, rule-long, rule-injection or
    rule-several (W), or the inner judge's. Known names are `names` and the truths of `check`; a
    truth that is neither still counts as known beside its own prediction.
    """

    def __init__(self, inner: Judge, names: Iterable[str] = ()) -> None:
        """names: labels, names and synonyms of any things, for telling names from lists."""
        super().__init__(inner)
        self._learn(Names(names))

    def _learn(self, names: Names) -> None:
        self._names = names
        digest = hashlib.sha256("\n".join(sorted(names.known)).encode()).hexdigest()[:12]
        self.identity = f"rules-v{VERSION}-{digest}({self.inner.identity})"
        self._ruling: Callable[[str, str], Verdict | None] = lru_cache(_CACHED)(
            lambda truth, prediction: rule(truth, prediction, names)
        )

    def check(self, truths: Iterable[str]) -> None:
        """Knows `truths` from here on. Raises ValueError naming a truth without a word in it, and
        whatever the inner judge raises."""
        distinct = list(dict.fromkeys(truths))
        for truth in distinct:
            if not keys(truth):
                raise ValueError(f"truth {truth!r} has no word in it: no answer could be right")
        self._learn(Names((*self._names.texts, *distinct)))
        super().check(distinct)

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order; see the class."""
        return in_order(len(pairs), self.grade_each(pairs))

    def grade_each(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict): those by rule first, then the inner judge's as it makes them."""
        ruling = self._ruling
        rulings = [ruling(pair.truth, pair.prediction[: LONGEST + 1]) for pair in pairs]
        rest = [i for i, verdict in enumerate(rulings) if verdict is None]
        self.counts.add("pairs", len(pairs))
        self.counts.add("by_rule", len(pairs) - len(rest))
        yield from ((i, verdict) for i, verdict in enumerate(rulings) if verdict is not None)
        if rest:
            for i, verdict in each_verdict(self.inner, [pairs[i] for i in rest]):
                yield rest[i], verdict


def rule(truth: str, prediction: str, names: Names) -> Verdict | None:
    """The verdict on a prediction that needs no model, or None."""
    if len(prediction) > LONGEST:
        return Verdict(W, "rule-long" if prediction.strip() else "rule-empty")
    candidates = keys(prediction)
    if not candidates or not _WORD.search(candidates[0]):
        return Verdict(W, "rule-empty")
    found = names.find_keys(candidates)
    if _is_truth(truth, candidates, found, names):
        return Verdict(S, "rule-name")
    if found is not None:
        return None
    if candidates[0] in ABSTENTIONS:
        return Verdict(A, "rule-abstain")
    if not _LABELS.isdisjoint(candidates):
        return Verdict(W, "rule-injection")
    seen = plain(level(prediction))
    broken = None if prediction.isascii() else _broken(prediction)
    if _speaks(prediction, seen) or (broken and _speaks(broken, broken)):
        return Verdict(W, "rule-injection")
    if any(offers_several(reading, names, truth) for reading in (seen, broken) if reading):
        return Verdict(W, "rule-several")
    return None


def _is_truth(truth: str, candidates: Sequence[str], found: str | None, names: Names) -> bool:
    """Whether a text of these keys, known as `found`, is the truth and no other known name."""
    known = names.find_keys(keys(truth))
    if found is None and known is None:
        return not set(candidates).isdisjoint(keys(truth))
    return found == known


def _broken(text: str) -> str | None:
    """The text, plain, with a line break for every character that is not seen; None without any."""
    broken = "".join(visible(char) or "\n" for char in text)
    return plain(level(broken)) if "\n" in broken else None


def _speaks(text: str, seen: str) -> bool:
    """Whether a text, plainly read as `seen`, is a label or a command rather than a name."""
    if _CONTROL.search(text) or _LABEL_SIGN.fullmatch(seen):
        return True
    views = {seen, plain(text)}
    if not text.isascii():
        views.add(plain(unicodedata.normalize("NFKC", visible(text))))
    for view in views:
        if _SPOKEN_WORDS.search(view) or (_ODD.search(view) and _SPOKEN_SIGNS.search(view)):
            return True
    return bool(_RUN_TOGETHER.search(_NO_LETTER.sub("", seen)))
