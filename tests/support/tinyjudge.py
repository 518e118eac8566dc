"""Tokenizers and language models for judges, made here: random weights, real layouts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from speciarl.judge.base import Pair
from speciarl.judge.labels import LabelPrompt
from speciarl.judge.prompt import VARIANTS, messages
from tiny import sharpen

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral's: no system role, and a blank before what the model says.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}"
    " {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTROL_PIECES = ["<unk>", "<s>", "</s>"]


def corpus() -> list[str]:
    """The judge's own instructions, and what pairs look like."""
    pair = Pair("Golden-winged Warbler, F/A-18", "none")
    return [turn["content"] for name in VARIANTS for turn in messages(pair, name)]


def bytes_tokenizer(texts: Iterable[str] = (), special: Iterable[str] = CONTROL) -> Any:
    """Byte-level BPE with a ChatML template, as Qwen's; `texts` are learnt too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*corpus(), *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def pieces_tokenizer(template: str | None = INST) -> Any:
    """BPE over words that carry their blank before them, bytes for the rest, as Llama 2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False)
    core.train_from_iterator(corpus(), trainer)
    learnt = json.loads(core.to_str())["model"]
    every = [*CONTROL_PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    core.model = models.BPE(
        vocab={piece: i for i, piece in enumerate(every)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _sizes(tokenizer: Any, layers: int = 2, hidden: int = 64) -> dict[str, Any]:
    return dict(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def config_of(kind: str, tokenizer: Any) -> Any:
    """Configurations of four families that differ where a judge could go wrong."""
    sizes = _sizes(tokenizer)
    if kind == "qwen2":  # tied output matrix
        return Qwen2Config(**sizes, tie_word_embeddings=True)
    if kind == "llama":
        return LlamaConfig(**sizes)
    if kind == "gemma2":  # windows shorter than the instructions, capped logits
        return Gemma2Config(**sizes, head_dim=16, sliding_window=100, final_logit_softcapping=5.0)
    return Lfm2Config(**sizes, layer_types=["conv", "full_attention"])  # state that is no cache


def save_judge(folder: Path, kind: str, tokenizer: Any) -> Path:
    """A random model with its tokenizer, in HF layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config_of(kind, tokenizer))
        sharpen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def drop_template(folder: Path) -> None:
    """Makes the tokenizer in `folder` one without a chat template."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))


@cache
def prompt_of(tokenizer: Any) -> LabelPrompt:
    """The tokenizer's prompt, made once."""
    return LabelPrompt(tokenizer)
