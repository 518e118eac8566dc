"""A tiny Qwen2.5-VL (0.8 M parameters) with tokenizer and image processor, saved in HF layout.

The folder loads as a released checkpoint does: AutoConfig, AutoTokenizer, AutoImageProcessor and
AutoModelForImageTextToText know nothing special about it.
"""

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AddedToken,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from speciarl.core.prompts import INSTRUCTION, QUESTIONS
from speciarl.core.toyshapes import FAMILIES, HUES
from speciarl.core.toyworld import DOMAINS

TOY_INSTRUCTION = "Answer inside <answer> </answer>."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
# Not special: decoding a completion keeps them, and the judge's parser needs to see them.
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
OTHER_WORDS = "user assistant system None none unknown It is a an the I see so or and this"
# At this width the usual 0.02 learns several times slower.
INIT_STD = 0.06
PATCH, MERGE, TEMPORAL = 14, 2, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_words() -> list[str]:
    """Every word of the prompts and labels, as it stands and with a space before it, sorted."""
    labels = [*DOMAINS.values(), *HUES, *(f for group in FAMILIES.values() for f in group)]
    text = " ".join([*QUESTIONS.values(), INSTRUCTION, TOY_INSTRUCTION, OTHER_WORDS, *labels])
    words = set(re.findall(r"[A-Za-z]+", text)) | {name.capitalize() for name in labels}
    return sorted(form for word in words for form in (word, " " + word))


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: any text round-trips, and every word of the toy world is one token.

    The words are whole entries of the vocabulary (`ignore_merges`), so nothing is trained.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ") for word in toy_words() if len(word) > 1]
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:], padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def toy_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Text: 3 layers of 128. Vision: 2 layers of 64. The head is not tied to the embedding."""

    def ident(token: str) -> int:
        return tokenizer.get_vocab()[token]

    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        # One rotary section per axis; they add up to half of a head's width (16).
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]),
        initializer_range=INIT_STD, bos_token_id=None,
        eos_token_id=ident("<|im_end|>"), pad_token_id=ident("<|endoftext|>"),
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=PATCH,
        spatial_merge_size=MERGE, temporal_patch_size=TEMPORAL, out_hidden_size=128,
        window_size=112, fullatt_block_indexes=[1], initializer_range=INIT_STD,
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=ident("<|image_pad|>"), video_token_id=ident("<|video_pad|>"),
        vision_start_token_id=ident("<|vision_start|>"),
        vision_end_token_id=ident("<|vision_end|>"),
    )  # fmt: skip


def _preprocessor() -> dict[str, object]:
    """Lets images of 56 x 56 to 84 x 84 pixels through as 4 to 9 merged tokens."""
    cell = PATCH * MERGE
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": 4 * cell**2, "longest_edge": 9 * cell**2},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }


def save_toymodel(folder: str | Path, seed: int = 0) -> Path:
    """Writes an untrained toy checkpoint (fp32 safetensors) into `folder`; returns it.

    The same seed gives the same weights; the caller's random state is left as it was.
    """
    folder = Path(folder)
    tokenizer = toy_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(toy_config(tokenizer))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(), indent=1) + "\n")
    return folder
