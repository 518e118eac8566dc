"""Every class name of six data sets against the rules: itself is S, two at once are W."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from speciarl.judge.base import Pair, Verdict
from speciarl.judge.hedges import Names
from speciarl.judge.packaged import resolve
from speciarl.judge.rules import RuleJudge, rule
from speciarl.kernels.codes import S_PLUS, S, W

FOLDER = Path(__file__).parent / "data" / "names"
SETS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}
SIZES = {
    "cub-200-2011": 200,
    "fgvc-aircraft-families": 70,
    "fgvc-aircraft-variants": 100,
    "flowers-102": 102,
    "food-101": 101,
    "oxford-pets": 37,
    "stanford-cars": 196,
}
LABELS = {name: [row["label"] for row in content["labels"]] for name, content in SETS.items()}
EVERYTHING = [
    text
    for content in SETS.values()
    for row in content["labels"]
    for text in (row["label"], *row.get("synonyms", ()))
]
JOINTS = (" or ", " and ", "/", " / ", ", ", ",", ", or ", " OR ", " & ", "; ", " | ", "\n")
each_set = pytest.mark.parametrize("name", SIZES)


class Model:
    """Stands for the model behind the rules: S+ for all, so that no case can pass unnoticed."""

    identity = "model"
    concurrent = True

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [Verdict(S_PLUS, "model") for _ in pairs]

    def check(self, truths: object) -> None: ...

    def tally(self) -> dict[str, float]:
        return {}

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def judge_of(truths: Sequence[str], names: Sequence[str] = ()) -> RuleJudge:
    judge = RuleJudge(Model(), names)
    judge.check(truths)
    return judge


def plural(name: str) -> str:
    name = name.rstrip("?")
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def variants(name: str) -> list[str]:
    spaced = name.replace("_", " ")
    texts = [name, spaced, name.upper(), name.lower(), name.title(), name.swapcase()]
    texts += [f"{article} {spaced}" for article in ("a", "an", "the", "A", "The", "THE")]
    texts += [spaced.replace(" ", "-"), spaced.replace("-", " "), spaced.replace(" ", "_")]
    texts += [spaced.replace("-", ""), spaced.replace("'", "\u2019"), spaced.replace("'", "")]
    texts += [plural(spaced), f"the {plural(spaced)}", plural(spaced).replace(" ", "-")]
    texts += [f" {name}. ", f'"{name}"', f"**{name}**", f"{name}!", f"`{name}`\n", f"({name})"]
    texts += [name.replace(" and ", " & "), name.replace("/", "-"), name.replace(" ", "  ")]
    return texts


def test_the_files_are_whole() -> None:
    assert {name: len(labels) for name, labels in LABELS.items()} == SIZES
    for content in SETS.values():
        assert set(content) == {"dataset", "source", "labels"} and content["source"]
        labels = [row["label"] for row in content["labels"]]
        assert len(set(labels)) == len(labels)
        assert all(label == label.strip() and label.isascii() for label in labels)


def test_the_birds_are_those_of_the_taxonomy() -> None:
    nodes = json.loads(resolve("cub-200-2011").read_text("utf-8"))["nodes"]
    assert LABELS["cub-200-2011"] == [node["name"] for node in nodes if "class" in node]


@each_set
@pytest.mark.parametrize("names", [[], EVERYTHING], ids=["labels only", "all names"])
def test_a_name_is_itself(name: str, names: list[str]) -> None:
    judge = judge_of(LABELS[name], names)
    pairs = [Pair(label, text) for label in LABELS[name] for text in variants(label)]
    verdicts = judge.grade(pairs)
    bad = [(p, v) for p, v in zip(pairs, verdicts, strict=True) if v != Verdict(S, "rule-name")]
    assert not bad
    assert judge.tally() == {"pairs": len(pairs), "by_rule": len(pairs)}


@each_set
def test_a_name_is_itself_before_any_truth_is_known(name: str) -> None:
    judge = RuleJudge(Model())
    labels = LABELS[name]
    pairs = [Pair(label, text) for label in labels for text in (label, f"the {plural(label)}")]
    assert {verdict.source for verdict in judge.grade(pairs)} == {"rule-name"}


@each_set
def test_two_names_are_two(name: str) -> None:
    """Every joint between neighbours, in both orders, and one joint for other ordered pairs."""
    labels = LABELS[name]
    names = Names(labels)
    texts = [
        (left, text)
        for left, right in zip(labels, labels[1:] + labels[:1], strict=True)
        for joint in JOINTS
        for text in (f"{left}{joint}{right}", f"a {right}{joint}the {left.lower()}")
    ]
    drawn = random.Random(7)
    pairs = list(itertools.permutations(labels, 2))
    for left, right in drawn.sample(pairs, min(len(pairs), 3000)):
        texts.append((drawn.choice((left, right)), left + drawn.choice(JOINTS) + right))
    for truth, text in texts:
        assert rule(truth, text, names) == Verdict(W, "rule-several"), text


@each_set
def test_two_names_with_all_names_known(name: str) -> None:
    judge = judge_of(LABELS[name], EVERYTHING)
    drawn = random.Random(11)
    pairs = []
    for _ in range(2000):
        left, right = drawn.sample(LABELS[name], 2)
        text = left + drawn.choice(JOINTS) + right
        pairs.append(Pair(drawn.choice([left, right]), drawn.choice([text, text.lower()])))
    verdicts = judge.grade(pairs)
    bad = [p for p, v in zip(pairs, verdicts, strict=True) if v != Verdict(W, "rule-several")]
    assert not bad


@each_set
def test_another_name_is_left_to_the_model(name: str) -> None:
    judge = judge_of(LABELS[name], EVERYTHING)
    labels = LABELS[name]
    pairs = [Pair(a, b) for a, b in zip(labels, labels[1:] + labels[:1], strict=True)]
    assert {verdict.source for verdict in judge.grade(pairs)} == {"model"}


def test_a_synonym_is_never_wrong_by_rule() -> None:
    judge = judge_of([label for labels in LABELS.values() for label in labels], EVERYTHING)
    pairs = [
        Pair(row["label"], text)
        for content in SETS.values()
        for row in content["labels"]
        for synonym in row.get("synonyms", ())
        for text in (synonym, f"a {synonym}", synonym.upper())
    ]
    assert {verdict.category for verdict in judge.grade(pairs)} <= {S, S_PLUS}


def test_a_name_as_an_index_or_with_a_doubt_is_left_to_the_model() -> None:
    """Over all names at once, so that the parts of one are often the name of another."""
    known = Names(EVERYTHING)
    for text in EVERYTHING:
        *first, last = text.split()
        for said in (f"{last}, {' '.join(first)}", f"{text}, I think", f"{text} (probably)"):
            found = rule(text, said, known)
            assert not first or found is None or found.category == S, said


@pytest.mark.parametrize(
    "text", ["Iris × germanica", "Viola × wittrockiana", "you tiao", "motor grader"]
)
def test_a_name_with_an_odd_sign_or_word_is_left_to_the_model(text: str) -> None:
    assert rule("orchid", text, Names(EVERYTHING)) is None
