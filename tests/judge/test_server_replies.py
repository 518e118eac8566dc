"""The verdict in what a server answers."""

import math
from typing import Any

import pytest

from speciarl.judge.base import Verdict
from speciarl.judge.http_retry import Fault
from speciarl.judge.prompt import LABELS, category_of
from speciarl.judge.replies import label_in, verdict_in
from speciarl.kernels.codes import A, S


def completion(text: str | None, *listed: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": score} for token, score in listed]
    logprobs = {"content": [{**top[0], "top_logprobs": top}]} if top else None
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}


def test_log_probabilities_are_renormalised_over_the_labels() -> None:
    shares = {"A": 0.05, " A": 0.05, "B": 0.2, "C": 0.03, "D": 0.02, "E": 0.01, "F": 0.04}
    listed = [("The", math.log(0.6)), *((token, math.log(p)) for token, p in shares.items())]
    verdict = verdict_in(completion("The", *listed), "ladder")
    assert verdict.category == A and verdict.probabilities is not None
    assert verdict.margin == pytest.approx(math.log(2))
    by_label = [p / 0.4 for p in (0.1, 0.2, 0.03, 0.02, 0.01, 0.04)]
    assert verdict.probabilities == pytest.approx(by_label)


def test_a_label_that_is_not_listed_is_less_likely_than_what_is() -> None:
    verdict = verdict_in(completion("B", ("B", -0.5), ("The", -1.5)), "ladder")
    assert verdict.category == A and verdict.margin == pytest.approx(1.0, abs=1e-4)
    lone = verdict_in(completion("E", ("E", -30.0)), "ladder")
    assert lone.category == S and lone.margin == pytest.approx(0.0, abs=1e-4)
    masked = completion("B", ("B", 0.0), ("A", -9999.0), ("C", float("-inf")))
    assert verdict_in(masked, "ladder").category == A


def test_the_token_that_was_chosen_counts_where_it_is_not_among_the_likeliest() -> None:
    """A guide chooses it; vLLM lists the probabilities from before."""
    reply = completion("B", ("The", -0.1), ("This", -3.0))
    reply["choices"][0]["logprobs"]["content"][0] |= {"token": "B", "logprob": -7.0}
    verdict = verdict_in(reply, "ladder")
    assert verdict.category == A and verdict.margin == pytest.approx(0.0, abs=1e-4)


def test_a_variant_has_its_own_letters() -> None:
    for variant in ("ladder", "relation", "referee"):
        for letter in LABELS:
            found = verdict_in(completion(letter), variant)
            assert found == Verdict(category_of(letter, variant), "model")


@pytest.mark.parametrize(
    "text", ["B", " B\n", '"B"', "B.", "`B`", '{"label": "B"}', '{ "label":"B"} ']
)
def test_one_label_in_a_text(text: str) -> None:
    assert label_in(text) == "B"


@pytest.mark.parametrize(
    "text",
    ["", "b", "G", "AB", "A B", "A, B", "A or B", "B because", "Label: B", "A\nB", "(B)", "wrong"]
    + ['{"label": "G"}', '{"label": ["B"]}', '{"a": "A", "b": "B"}', '{"label": "B"', "{}", "[]"],
)
def test_anything_else_is_no_label(text: str) -> None:
    assert label_in(text) is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "garbage"),
        ([], "garbage"),
        ({"choices": []}, "garbage"),
        ({"choices": "A"}, "garbage"),
        ({"choices": [None]}, "garbage"),
        ({"choices": [{}]}, "no-label"),
        ({"choices": [{"message": {"content": ["A"]}, "logprobs": 3}]}, "no-label"),
        ({"choices": [{"message": None, "logprobs": {"content": [{"token": "A"}]}}]}, "no-label"),
        (completion(None), "no-label"),
        (completion("Z", ("Z", -0.1), ("The", -2.0)), "no-label"),
        (completion("", ("A", float("nan"))), "no-label"),
    ],
)
def test_a_reply_without_a_verdict(reply: Any, reason: str) -> None:
    with pytest.raises(Fault) as raised:
        verdict_in(reply, "ladder")
    assert raised.value.reason == reason
