"""Labels as tokens, and scores as verdicts."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tinyjudge
from speciarl.core.toymodel import toy_tokenizer
from speciarl.judge.base import Pair
from speciarl.judge.labels import LabelPrompt, label_ids, verdict_of
from speciarl.judge.prompt import LABELS, VARIANTS, category_of, messages
from speciarl.kernels.codes import S_PLUS, A, G, S, W

PAIR = Pair("Golden-winged Warbler", "a warbler")
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an answer without thinking begins with empty thoughts.
THINKS = tinyjudge.CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
ALWAYS = tinyjudge.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# As Llama 3.2's: the day stands in the prompt, unless one is given.
DATED = "{{ date_string if date_string is defined else strftime_now('%c') }}" + tinyjudge.CHATML


def bytes_with(template: str | None) -> Any:
    tokenizer = tinyjudge.bytes_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def whole(prompt: LabelPrompt, tokenizer: Any, pair: Pair = PAIR) -> str:
    return str(tokenizer.decode([*prompt.head, *prompt.suffix(pair)]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chat_is_that_of_the_template(variant: str) -> None:
    """Text and ids of a ChatML prompt, put together from its three pieces."""
    tokenizer = bytes_with(tinyjudge.CHATML)
    prompt = LabelPrompt(tokenizer, variant)
    text = tokenizer.apply_chat_template(
        messages(PAIR, variant), tokenize=False, add_generation_prompt=True
    )
    assert whole(prompt, tokenizer) == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [*prompt.head, *prompt.suffix(PAIR)] == ids
    for letter, label in zip(LABELS, prompt.labels, strict=True):
        assert tokenizer(text + letter)["input_ids"] == [*ids, label]


TEMPLATES: dict[str, tuple[Any, str, str]] = {  # tokenizer, end of the prompt, label as text
    "chatml": (bytes_with(tinyjudge.CHATML), "<|im_start|>assistant\n", "A"),
    "parts": (bytes_with(PARTS), "<|im_start|>assistant\n", "A"),
    "may think": (bytes_with(THINKS), "assistant\n<think>\n\n</think>\n\n", "A"),
    "always thinks": (bytes_with(ALWAYS), "assistant\n<think>\n\n</think>\n\n", "A"),
    "no system role": (tinyjudge.pieces_tokenizer(), " [/INST]", " A"),
    "plain, bytes": (bytes_with(None), "\nLabel:", " A"),
    "plain, pieces": (tinyjudge.pieces_tokenizer(None), "\nLabel:", " A"),
    "toy": (toy_tokenizer(), "<|im_start|>assistant\n", "A"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_layout(name: str) -> None:
    tokenizer, end, label = TEMPLATES[name]
    prompt = LabelPrompt(tokenizer)
    text = whole(prompt, tokenizer)
    system, user = (turn["content"] for turn in messages(PAIR))
    assert text.count(system) == text.count(user) == 1 and text.index(system) < text.index(user)
    assert len(set(prompt.labels)) == len(LABELS)
    for letter, i in zip(LABELS, prompt.labels, strict=True):
        both = tokenizer.decode([*prompt.tail, i])
        assert both.endswith(end + label.replace("A", letter)), both
        assert tokenizer.decode([i]).strip() == letter
    if name.startswith("plain") and tokenizer.bos_token_id is not None:
        assert prompt.head[0] == tokenizer.bos_token_id
    assert prompt.suffix(PAIR) == LabelPrompt(tokenizer).suffix(PAIR)


def test_label_ids_are_the_prompts() -> None:
    for tokenizer, _, _ in TEMPLATES.values():
        assert label_ids(tokenizer) == list(LabelPrompt(tokenizer).labels)


def test_the_prompt_does_not_change_by_the_day() -> None:
    tokenizer = bytes_with(DATED)
    assert whole(LabelPrompt(tokenizer), tokenizer).startswith("1 January 2025")


def test_digest_is_that_of_tokens() -> None:
    chat = bytes_with(tinyjudge.CHATML)
    digests = [LabelPrompt(chat, variant).digest() for variant in VARIANTS]
    digests.append(LabelPrompt(bytes_with(THINKS)).digest())
    digests.append(LabelPrompt(bytes_with(None)).digest())
    assert len(set(digests)) == len(digests)
    assert LabelPrompt(bytes_with(tinyjudge.CHATML)).digest() == digests[0]


def words_tokenizer(words: list[str], **options: Any) -> Any:
    vocab = {word: i for i, word in enumerate(["[UNK]", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", name_or_path="tiny-words", **options
    )


def test_labels_that_are_no_tokens() -> None:
    with pytest.raises(ValueError, match="'tiny-words'.* labels A, B, C, D, E, F"):
        label_ids(words_tokenizer(["robin", "A", "B", "C", "D", "E"]))
    assert len(label_ids(words_tokenizer(["robin", *LABELS]))) == len(LABELS)


def test_template_that_cannot_ask() -> None:
    tokenizer = words_tokenizer(list(LABELS))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template of tokenizer 'tiny-words'"):
        label_ids(tokenizer)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="prompt variant 'best'"):
        LabelPrompt(toy_tokenizer(), "best")


scores = st.lists(st.floats(-50, 50), min_size=6, max_size=6)


@given(scores, st.sampled_from(VARIANTS))
def test_verdict_is_a_softmax(logits: list[float], variant: str) -> None:
    verdict = verdict_of(logits, "model", variant)
    assert verdict.category is not None and verdict.probabilities is not None
    assert verdict.margin is not None and verdict.margin >= 0
    assert math.isclose(math.fsum(verdict.probabilities), 1.0)
    norm = math.fsum(math.exp(score) for score in logits)
    for letter, score in zip(LABELS, logits, strict=True):
        found = verdict.probabilities[category_of(letter, variant) - W]
        assert math.isclose(found, math.exp(score) / norm, rel_tol=1e-9)
    ranked = sorted(logits)
    assert logits[[category_of(x, variant) for x in LABELS].index(verdict.category)] == ranked[-1]
    assert verdict.margin == ranked[-1] - ranked[-2]


@given(scores, st.floats(-20, 20))
def test_a_shift_of_all_scores_changes_nothing(logits: list[float], shift: float) -> None:
    one = verdict_of(logits, "model")
    other = verdict_of([score + shift for score in logits], "model")
    if one.margin and one.margin > 1e-6:
        assert one.category == other.category
    assert one.probabilities == pytest.approx(other.probabilities)


def test_equals_go_to_the_lower_rung() -> None:
    for variant in VARIANTS:
        verdict = verdict_of([0.0] * 6, "model", variant)
        assert (verdict.category, verdict.margin) == (W, 0.0)
    by_code = {A: 1.0, S: 1.0}
    logits = [by_code.get(category_of(letter), 0.0) for letter in LABELS]
    assert verdict_of(logits, "model").category == A


def test_what_was_not_scored() -> None:
    none = -math.inf
    some = verdict_of([none, none, -0.5, none, -1.5, none], "server")
    assert (some.category, some.margin, some.source) == (G, 1.0, "server")
    assert some.probabilities is not None and some.probabilities[S_PLUS] == 0.0
    one = verdict_of([none, none, none, none, none, -3.0], "server")
    assert (one.category, one.margin) == (S_PLUS, None)
    for bad in ([none] * 6, [math.nan, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, math.inf]):
        verdict = verdict_of(bad, "server")
        assert (verdict.category, verdict.source) == (None, "no-label")
    with pytest.raises(ValueError, match="5 scores for the 6 labels A"):
        verdict_of([1.0] * 5, "server")
