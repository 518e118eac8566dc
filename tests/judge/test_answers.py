"""The answer in a completion, and the forms of a name."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciarl.judge.answers import (
    forms,
    is_abstention,
    key_of,
    normalise,
    parse_answer,
    singulars,
    split_options,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>robin</answer>", "robin"),
        ("<think>red breast</think><answer> robin\n</answer>", "robin"),
        ("<think>a < b, never closed <answer>robin</answer> done", "robin"),
        ("<think>first</think><think>second</think>\n<answer>robin</answer>", "robin"),
        ("<answer></answer>", ""),
        ("<answer> \n </answer>", ""),
        ("<answer>a > b</answer>", "a > b"),
        ("<answer>robin or cardinal</answer>", "robin or cardinal"),
        ("", None),
        ("robin", None),
        ("<answer>robin", None),
        ("robin</answer>", None),
        ("</answer>robin<answer>", None),
        ("<answer>robin<answer>", None),
        ("<answer>robin</answer><answer>cardinal</answer>", None),
        ("<think>say <answer>x</answer></think><answer>robin</answer>", None),
        ("<answer><answer>robin</answer></answer>", None),
        ("<answer>robin</answer></answer>", None),
        ("<answer><think>hm</think>robin</answer>", None),
        ("<Answer>robin</Answer>", None),
        ("<answer >robin</answer >", None),
    ],
)
def test_parse_answer(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "x", " "])))
def test_parse_answer_against_a_scan(parts: list[str]) -> None:
    tags = [(i, part) for i, part in enumerate(parts) if "answer" in part]
    expected = None
    if [part for _, part in tags] == ["<answer>", "</answer>"]:
        inside = parts[tags[0][0] + 1 : tags[1][0]]
        if not any("think" in part for part in inside):
            expected = "".join(inside).strip()
    assert parse_answer("".join(parts)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "black footed albatross",
        "Black-footed Albatross",
        "BLACK_FOOTED_ALBATROSS",
        "  Black\tfooted   albatross. \n",
        '"Black-footed albatross"',
        "Black\u2011footed albatross",
        "Black\u2013footed\u00a0albatross",
    ],
)
def test_normalise_levels_what_tells_no_names_apart(text: str) -> None:
    assert normalise(text) == "black footed albatross"


def test_normalise_accents_and_apostrophes() -> None:
    assert normalise("Crème Brûlée") == "creme brulee"
    assert normalise("Chuck-will\u2019s-widow") == "chuck wills widow"


@pytest.mark.parametrize(
    "separator", [", ", ",", "/", " / ", ";", "|", "\n", " or ", " and ", " & ", " - ", "\u2014"]
)
def test_normalise_keeps_every_separator(separator: str) -> None:
    kept = separator.strip(" ") or "\n"
    assert kept in normalise(f"robin{separator}cardinal")
    assert kept in key_of(f"robin{separator}cardinal")


@given(st.text(max_size=40))
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_key_joins_hyphen_blank_and_nothing() -> None:
    assert key_of("Golden-rod") == key_of("golden rod") == key_of("Goldenrod")
    assert key_of("F/A-18") == "f/a18"


def plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@given(st.text(string.ascii_lowercase, min_size=3, max_size=12))
def test_singulars_undo_the_regular_plural(word: str) -> None:
    assert word in singulars(plural(word))


@pytest.mark.parametrize(
    ("many", "one"),
    [
        ("geese", "goose"),
        ("titmice", "titmouse"),
        ("wolves", "wolf"),
        ("doves", "dove"),
        ("magpies", "magpie"),
        ("lilies", "lily"),
        ("cacti", "cactus"),
        ("irises", "iris"),
        ("emus", "emu"),
        ("172s", "172"),
    ],
)
def test_singulars_of_irregular_words(many: str, one: str) -> None:
    assert one in singulars(many)


def test_singulars_leave_model_names_alone() -> None:
    assert singulars("tts") == singulars("s4") == singulars("grass") == ()


def test_forms_put_the_literal_text_first() -> None:
    assert list(forms("The Robins")) == ["therobins", "robins", "therobin", "robin"]
    assert "birdofparadise" in forms("birds of paradise")


def test_forms_of_a_plural_after_a_capital() -> None:
    assert "gulfstreamiv" in forms("Gulfstream IVs.")
    assert "f16a/b" in forms("the F-16A/Bs")
    assert "auditt" not in forms("Audi TTS") and "gulfstreami" not in forms("Gulfstream IV")


def test_a_hyphen_after_an_abbreviation() -> None:
    assert key_of("Conv.-Convertible") == key_of("Conv. Convertible")


def test_article_needs_a_blank() -> None:
    assert list(forms("A-10")) == ["a10"]
    assert next(forms("A 300")) == "a300"


@pytest.mark.parametrize(
    "text",
    ["None", "none.", "I don't know", "I don\u2019t know.", "i_dont_know", "Cannot tell", "N/A"]
    + ["unknown", "I can't tell", "UNKNOWN.", '"None"', "I cannot identify", "not sure"],
)
def test_abstentions(text: str) -> None:
    assert is_abstention(text)


@pytest.mark.parametrize("text", ["", "robin", "none or robin", "unknown bird", "nonesuch"])
def test_no_abstentions(text: str) -> None:
    assert not is_abstention(text)


def test_split_options() -> None:
    assert split_options("Robin or cardinal") == ["robin", "cardinal"]
    assert split_options("robin/cardinal, maybe wren") == ["robin", "cardinal", "wren"]
    assert split_options("animal > bird > robin") == ["animal", "bird", "robin"]
    assert split_options("robin - cardinal") == ["robin", "cardinal"]
    assert split_options("black-footed albatross") == ["black-footed albatross"]
    assert split_options("oriole") == ["oriole"]
    assert split_options("") == []
