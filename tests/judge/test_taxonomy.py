"""The exact judge against written-out grades, and against a walk up the tree."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speciarl.judge.answers import key_of
from speciarl.judge.base import Judge, Pair, Verdict
from speciarl.judge.taxonomy import Node, Taxonomy, TaxonomyJudge
from speciarl.kernels.codes import S_MINUS, S_PLUS, A, G, S, W

Entry = tuple[str, str | None, list[str]]

BIRDS: list[Entry] = [
    ("Passeriformes", None, ["perching bird", "songbird"]),
    ("Parulidae", "Passeriformes", ["warbler", "New World warbler"]),
    ("Setophaga", "Parulidae", []),
    ("Yellow Warbler", "Setophaga", ["Setophaga petechia"]),
    ("Golden Warbler", "Yellow Warbler", []),
    ("Cerulean Warbler", "Setophaga", ["Setophaga cerulea"]),
    ("Procellariiformes", None, []),
    ("Diomedeidae", "Procellariiformes", ["albatross"]),
    ("Phoebastria", "Diomedeidae", []),
    ("Black-footed Albatross", "Phoebastria", ["Phoebastria nigripes"]),
    ("Brewer Blackbird", "Passeriformes", []),
    ("American Robin", "Passeriformes", ["robin"]),
    ("Northern Cardinal", "Passeriformes", ["cardinal"]),
]

# Real labels that look like several names, or that a careless rule would spoil.
HONEST = [
    *["Fish and chips", "Hot and sour soup", "Macaroni and cheese", "Crème brûlée", "Hot dog"],
    *["F/A-18", "Boeing 737-800", "A300B4", "DC-9-30", "Cessna 172", "Black-and-white Warbler"],
    *["Ram C/V Cargo Van Minivan 2012", "Audi TTS Coupe 2012", "BMW 1 Series Coupe 2012"],
    *["AM General Hummer SUV 2000", "Mercedes-Benz SL-Class Coupe 2009", "Eggs Benedict"],
    *["bird of paradise", "colt's foot", "snapdragon", "Great Pyrenees", "Saint Bernard"],
    *["Le Conte Sparrow", "Brandt Cormorant", "Red faced Cormorant", "Chuck will Widow"],
    *["Boat tailed Grackle", "Ovenbird"],
]  # fmt: skip


def nodes_of(entries: list[Entry]) -> list[Node]:
    return [
        Node(name, parent, tuple(synonyms), f"nodes[{i}]")
        for i, (name, parent, synonyms) in enumerate(entries)
    ]


def judge_of(entries: list[Entry]) -> TaxonomyJudge:
    return TaxonomyJudge(Taxonomy(nodes_of(entries), origin="memory"))


def flat(names: list[str]) -> list[Entry]:
    return [("thing", None, []), *((name, "thing", []) for name in names)]


def verdict(judge: TaxonomyJudge, truth: str, prediction: str) -> Verdict:
    return judge.grade([Pair(truth, prediction)])[0]


birds = judge_of(BIRDS)


@pytest.mark.parametrize(
    ("prediction", "category", "source"),
    [
        ("Yellow Warbler", S, "name"),
        ("Setophaga petechia", S, "name"),
        ("a yellow-warbler.", S, "name"),
        ("YELLOW_WARBLERS", S, "name"),
        ("the golden warbler", S_PLUS, "name"),
        ("Setophaga", S_MINUS, "name"),
        ("warbler", G, "name"),
        ("New World Warblers", G, "name"),
        ("songbird", G, "name"),
        ("Passeriformes", G, "name"),
        ("Cerulean Warbler", W, "name"),
        ("albatross", W, "name"),
        ("None", A, "abstain"),
        ("I don't know.", A, "abstain"),
        ("", W, "empty"),
        ("  ", W, "empty"),
        (".", W, "unknown"),
        ("penguin", W, "unknown"),
        ("yellow bird", W, "unknown"),
        ("not a warbler", W, "unknown"),
        ("yellow warbler or cerulean warbler", W, "several"),
        ("robin or cardinal", W, "several"),
        ("robin/cardinal", W, "several"),
        ("robin, maybe cardinal", W, "several"),
        ("songbird > warbler > Yellow Warbler", W, "several"),
        ("Yellow Warbler, Setophaga petechia", W, "several"),
        ("yellow warbler or none", W, "unknown"),
        ("yellow\nwarbler", W, "unknown"),
        ("x" * 100_000, W, "unknown"),
        ("yellow warbler " * 10_000, W, "unknown"),
    ],
)
def test_ladder_of_a_bird(prediction: str, category: int, source: str) -> None:
    assert verdict(birds, "Yellow Warbler", prediction) == Verdict(category, source)


@pytest.mark.parametrize(
    "truth", ["Black footed Albatross", "black-footed albatross", "Phoebastria nigripes"]
)
def test_truth_in_any_form(truth: str) -> None:
    for prediction, category in [("Black-Footed Albatross", S), ("albatross", G), ("robin", W)]:
        assert verdict(birds, truth, prediction).category == category


def test_possessive_is_no_difference() -> None:
    assert verdict(birds, "Brewer Blackbird", "Brewer's Blackbird").category == S
    other = judge_of([("Clark's Nutcracker", None, [])])
    assert verdict(other, "Clark Nutcracker", "clark\u2019s nutcrackers").category == S


def test_unknown_truth_is_a_fault_not_an_error() -> None:
    assert verdict(birds, "dodo", "dodo") == Verdict(None, "unknown-truth")
    assert verdict(birds, "dodo", "None").category is None


def test_check_lists_unknown_truths() -> None:
    birds.check(["Yellow Warbler", "Black footed Albatross"])
    extinct = [f"dodo {i}" for i in range(7)]
    with pytest.raises(ValueError, match="7 of 8 labels .* memory: 'dodo 0'.*and 2 more"):
        birds.check(["robin", *extinct, *extinct])


@st.composite
def forests(draw: st.DrawFn) -> list[Entry]:
    parents = draw(st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=12))
    return [
        (f"k{i}x", None if parent is None or not i else f"k{parent % i}x", [f"syn{i}x"])
        for i, parent in enumerate(parents)
    ]


@given(forests(), st.randoms(use_true_random=False))
def test_grades_against_a_walk_up_the_tree(entries: list[Entry], rng: Any) -> None:
    parent = {name: above for name, above, _ in entries}

    def line(name: str | None) -> list[str]:
        return [] if name is None else [name, *line(parent[name])]

    def expected(truth: str, prediction: str) -> int:
        if truth == prediction:
            return S
        if truth in line(prediction):
            return S_PLUS
        if prediction == parent[truth]:
            return S_MINUS
        return G if prediction in line(truth) else W

    shuffled = list(entries)
    rng.shuffle(shuffled)
    judge = judge_of(shuffled)
    pairs = [Pair(a, b) for a in parent for b in parent]
    for pair, graded in zip(pairs, judge.grade(pairs), strict=True):
        assert graded.category == expected(pair.truth, pair.prediction)
        synonym = pair.prediction.replace("k", "syn")
        assert verdict(judge, pair.truth, synonym) == graded


VARIANTS: list[Callable[[str], str]] = [
    str.upper,
    str.lower,
    lambda name: f"the {name}",
    lambda name: f"A {name}.",
    lambda name: name + ("es" if name.endswith("s") else "s"),
    lambda name: name.replace(" ", "-"),
    lambda name: name.replace("-", " "),
    lambda name: name.replace(" ", "_"),
    lambda name: f" {name} . ",
]


@pytest.mark.parametrize("name", HONEST)
def test_honest_names_are_never_taken_for_several(name: str) -> None:
    judge = judge_of(flat(HONEST))
    assert verdict(judge, name, name).category == S
    for variant in VARIANTS:
        assert verdict(judge, name, variant(name)).category == S, variant(name)


@pytest.mark.parametrize(
    "separator",
    [" or ", " and ", "/", " / ", ", ", ",", "; ", " | ", "\n", " - ", " & ", " ", "-", "_"],
)
def test_two_names_are_always_wrong(separator: str) -> None:
    judge = judge_of(flat(HONEST))
    names = [*HONEST, "thing"]
    pairs = [Pair(a, f"{a}{separator}{b}") for a in names for b in names]
    assert {graded.category for graded in judge.grade(pairs)} == {W}


@settings(max_examples=300)
@given(st.text(max_size=300))
def test_any_text_gets_a_verdict(text: str) -> None:
    graded = verdict(birds, "robin", text)
    assert graded.category is not None
    if graded.category not in (W, A):
        assert any(key_of(name).rstrip("s") in key_of(text) for name in names_and_synonyms())


def names_and_synonyms() -> list[str]:
    return [text for name, _, synonyms in BIRDS for text in (name, *synonyms)]


def test_a_derived_form_yields_to_a_literal_one_and_never_guesses() -> None:
    judge = judge_of(flat(["Aster", "Asters", "Pinks", "Pinkes"]))
    assert verdict(judge, "Aster", "asters").category == W
    assert verdict(judge, "Asters", "asters").category == S
    assert verdict(judge, "Pinks", "pink").category == W  # fits two names
    assert verdict(judge, "Pinks", "pinks").category == S


def test_threads_agree() -> None:
    pairs = [Pair(a, b) for a, _, _ in BIRDS for b in names_and_synonyms()]
    expected = birds.grade(pairs)
    with ThreadPoolExecutor(8) as pool:
        assert all(graded == expected for graded in pool.map(birds.grade, [pairs] * 16))


def test_is_a_judge() -> None:
    assert isinstance(birds, Judge)
    birds.sleep()
    birds.wake()
    assert birds.grade([]) == []
    birds.close()


def test_verdict_refuses_a_code_outside_the_ladder() -> None:
    for code in (-1, 6):
        with pytest.raises(ValueError, match="category"):
            Verdict(code, "name")


def test_a_synonym_repeated_on_its_own_node_is_harmless() -> None:
    judge = judge_of([("Golden-rod", None, ["goldenrod", "Golden rod"])])
    assert verdict(judge, "goldenrod", "golden rods").category == S
