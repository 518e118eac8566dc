"""The question to a judge: complete, balanced, and new whenever it is another one."""

import json
import re
from dataclasses import replace

import pytest

from speciarl.judge import prompt
from speciarl.judge.base import Pair
from speciarl.judge.prompt import (
    DEFAULT_VARIANT,
    LABELS,
    PROMPT_VERSION,
    VARIANTS,
    category_of,
    messages,
    prompt_id,
)
from speciarl.judge.taxonomy import Taxonomy, TaxonomyJudge
from speciarl.kernels.codes import S_MINUS, S_PLUS, A, G, S, W

LADDER = (W, A, G, S_MINUS, S, S_PLUS)


def worked(variant: str) -> list[tuple[str, str, int]]:
    """(truth, prediction, category) of the examples in a variant's system text."""
    text = messages(Pair("a", "b"), variant)[0]["content"]
    found = []
    for line in text.splitlines():
        if match := re.fullmatch(r"(\{.*\}) -> ([A-F])", line):
            pair = json.loads(match[1])
            category = category_of(match[2], variant)
            found.append((pair["ground_truth"], pair["prediction"], category))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_letters_stand_for_the_ladder(variant: str) -> None:
    assert sorted(category_of(letter, variant) for letter in LABELS) == sorted(LADDER)
    text = messages(Pair("a", "b"), variant)[0]["content"]
    assert [line[0] for line in text.splitlines() if line[1:4] == " = "] == list(LABELS)


def test_no_category_has_a_letter_twice() -> None:
    assert len(VARIANTS) > 1
    for code in LADDER:
        letters = [x for variant in VARIANTS for x in LABELS if category_of(x, variant) == code]
        assert len(letters) == len(set(letters)) == len(VARIANTS)
    assert category_of("E") == S and category_of("A") == W


@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_of_every_category_in_every_domain(variant: str) -> None:
    examples = worked(variant)
    for code in LADDER:
        assert sum(category == code for _, _, category in examples) >= 3
    truths = {truth for truth, _, _ in examples}
    for row in prompt._EXAMPLES.values():
        assert len(truths & {truth for truth, _ in row.values()}) == 3
    assert ("Baltimore Oriole", "oriole or goldfinch", W) in examples
    assert ("surf and turf", "surf & turf", S) in examples
    (order,) = (text for truth, text, _ in examples if truth == "daffodil")
    assert category_of(order[-1], variant) == S  # what it asks for, and does not get


def test_variants_differ() -> None:
    texts = [messages(Pair("a", "b"), variant)[0]["content"] for variant in VARIANTS]
    assert len(set(texts)) == len(texts)
    sets = [frozenset(worked(variant)) for variant in VARIANTS]
    assert len(set(sets)) == len(sets)


def test_the_exact_judge_agrees_with_examples_it_knows() -> None:
    """The packaged taxonomy of birds grades the examples about its classes alike."""
    birds = Taxonomy.load("cub-200-2011")
    judge = TaxonomyJudge(birds)
    every = {example for variant in VARIANTS for example in worked(variant)}
    known = [(t, p, c) for t, p, c in every if birds.known(t)]
    assert {category for _, _, category in known} >= {W, G, S_MINUS}
    for truth, prediction, category in known:
        assert judge.grade([Pair(truth, prediction)])[0].category == category, (truth, prediction)


def test_messages() -> None:
    system, user = messages(Pair('the "lion"', "Panthera leo\n"))
    assert system["role"] == "system" and user["role"] == "user"
    expected = {"ground_truth": 'the "lion"', "prediction": "Panthera leo"}
    assert json.loads(user["content"]) == expected
    assert system == messages(Pair("x", "<|im_end|>"), DEFAULT_VARIANT)[0]


def test_the_prompt_stays_short() -> None:
    """It must leave room in a context of 4,096 bytes, the smallest a judge may have."""
    for variant in VARIANTS:
        assert len(messages(Pair("a", "b"), variant)[0]["content"].encode()) < 3000


def test_prompt_id_is_that_of_all_that_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {variant: prompt_id(variant) for variant in VARIANTS}
    assert before == {variant: prompt_id(variant) for variant in VARIANTS}
    assert len(set(before.values())) == len(VARIANTS)
    assert before["ladder"].startswith(f"ladder-v{PROMPT_VERSION}-")
    changes = [
        ("PROMPT_VERSION", PROMPT_VERSION + 1),
        ("neutralise", str.strip),
        ("_SYSTEM", {**prompt._SYSTEM, "ladder": prompt._SYSTEM["ladder"] + "."}),
    ]
    swapped = prompt._WORDINGS["ladder"]
    swapped = replace(swapped, codes=swapped.codes[::-1])
    changes.append(("_WORDINGS", {**prompt._WORDINGS, "ladder": swapped}))
    for name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(prompt, name, value)
            assert prompt_id("ladder") != before["ladder"], name


def test_unknown_names() -> None:
    for call in (
        lambda: messages(Pair("a", "b"), "lader"),
        lambda: prompt_id("lader"),
        lambda: category_of("A", "lader"),
    ):
        with pytest.raises(ValueError, match="prompt variant 'lader': known are ladder"):
            call()
    with pytest.raises(ValueError, match="label 'G': the labels are A, B"):
        category_of("G")
