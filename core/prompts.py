"""From an example to the model's input, once: expanded ids, pixels, grid and M-RoPE positions.

Image processor and tokenizer are used directly. The stock Qwen-VL processor also demands a video
processor, which needs torchvision; what it does to an image prompt is to repeat the placeholder
once per merged patch, and that is done here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

# Not from the top of the package: there 5.12 asks for torchvision before it looks at the backend.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file

from speciarl.core.examples import Example, open_image
from speciarl.rollout.engine import Prompt

# SpeciaRL's two prompts differ in the first sentence only.
QUESTIONS = {
    "general": "Classify the image.",
    "be-specific": "Classify the image, be specific.",
}
# The paper gives the content of the instruction, not its exact words: these are ours.
INSTRUCTION = (
    "Think inside <think> </think> and answer inside "
    "<answer>a single label or the word 'None' to abstain.</answer>"
)
TURN_END = "<|im_end|>"

RopeIndex = Callable[..., tuple[Tensor, Tensor]]


class PromptTooLong(ValueError):
    """A prompt over the limit. It is never cut: half an image is no input a model knows."""

    def __init__(self, key: str, tokens: int, limit: int) -> None:
        super().__init__(f"prompt of {key}: {tokens} tokens, max_prompt_tokens is {limit}")
        self.key, self.tokens, self.limit = key, tokens, limit


class PromptBuilder:
    """Builds prompts for a Qwen-VL checkpoint (Qwen2.5-VL, Qwen3-VL) in HF layout.

    tokenizer: the checkpoint's own. stop_ids: tokens that end a completion. banned_ids: image and
    video placeholders; a sampled one would make the next forward expect pixels that do not exist.

    Raises ValueError for an unknown variant, for a chat template that is missing or does not place
    exactly one image placeholder, and for a model or image processor that is not of
    the Qwen-VL kind; OSError for a folder that is not a checkpoint.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        variant: str = "general",
        instruction: str = INSTRUCTION,
        max_prompt_tokens: int = 2048,
    ) -> None:
        if variant not in QUESTIONS:
            raise ValueError(f"prompt variant {variant!r}: known are {', '.join(QUESTIONS)}")
        path = str(model_path)
        self.config = AutoConfig.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = _processor_template(path)
        # The backends resize differently (by 0.015): always the one that needs no torchvision.
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.max_prompt_tokens = max_prompt_tokens
        self.image_id = _image_id(self.config)
        self.stop_ids = _stop_ids(path, self.tokenizer)
        self.banned_ids = _banned_ids(self.config)
        self.template_ids = self._template(f"{QUESTIONS[variant]} {instruction}".strip())
        self._rope_index = rope_index_of(self.config)

    def _template(self, text: str) -> list[int]:
        """Ids of the whole turn, with the image placeholder still a single token."""
        content: Any = [{"type": "image"}, {"type": "text", "text": text}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_id) != 1:
            raise ValueError(
                f"the chat template renders {ids.count(self.image_id)} image placeholders "
                f"(id {self.image_id}) for one image: {rendered!r}"
            )
        return list(ids)

    def images(self, image: Image.Image) -> dict[str, Tensor]:
        """pixel_values [P, D] f32 and image_grid_thw [1, 3] int64 of one RGB image."""
        out = self.image_processor(images=[image], return_tensors="pt")
        if "image_grid_thw" not in out:
            name = type(self.image_processor).__name__
            raise ValueError(f"{name} returns no image_grid_thw: not a Qwen-VL image processor")
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def expand(self, grid: Tensor) -> Tensor:
        """[L] int64: the turn's ids with one placeholder per merged patch of the grid [1, 3]."""
        count = int(grid.prod()) // self.image_processor.merge_size**2
        at = self.template_ids.index(self.image_id)
        return torch.tensor(
            self.template_ids[:at] + [self.image_id] * count + self.template_ids[at + 1 :]
        )

    def positions(self, input_ids: Tensor, grid: Tensor | None) -> Tensor:
        """[3, L] int64 for ids [L] with images of grid [I, 3]; all rows equal without M-RoPE."""
        if grid is None or self._rope_index is None:
            return torch.arange(len(input_ids)).expand(3, -1).clone()
        kinds = (input_ids == self.image_id).int()
        positions, _ = self._rope_index(
            input_ids=input_ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid
        )
        return positions[:, 0]

    def build(self, example: Example) -> Prompt:
        """The example's prompt.

        Raises BadImage for an image that cannot be used, PromptTooLong over max_prompt_tokens.
        """
        images = self.images(open_image(example.image))
        grid = images["image_grid_thw"]
        input_ids = self.expand(grid)
        if len(input_ids) > self.max_prompt_tokens:
            raise PromptTooLong(example.key, len(input_ids), self.max_prompt_tokens)
        return Prompt(
            key=example.key,
            input_ids=input_ids,
            positions=self.positions(input_ids, grid),
            images=images,
            truth=example.truth,
            dataset=example.dataset,
            domain=example.domain,
        )

    def completion_ids(self, text: str) -> list[int]:
        """A whole completion for supervised training: the ids of `text` and the stop token.

        Raises ValueError when the text contains an image or video placeholder.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if banned := sorted(set(ids) & set(self.banned_ids)):
            raise ValueError(f"a completion holds the placeholder ids {banned}: {text!r}")
        return [*ids, self.stop_ids[0]]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer, chat template and image processor into a checkpoint folder.

        Raises OSError when the folder cannot be written.
        """
        self.tokenizer.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(folder))
        # The class that was loaded depends on this machine; a checkpoint names the generic one.
        file = Path(folder) / "preprocessor_config.json"
        settings = json.loads(file.read_text())
        settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil")
        file.write_text(json.dumps(settings, indent=2) + "\n")

    def decode(self, ids: list[int]) -> str:
        """Text of a completion without special tokens; `<answer>` and `<think>` are kept."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def rope_index_of(config: PreTrainedConfig) -> RopeIndex | None:
    """`get_rope_index` of the checkpoint's own model class; None where there is no M-RoPE.

    The function reads the configuration only, so the model behind it has no weights ("meta").
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    owners: list[Any] = [model, getattr(model, "model", None)]
    for owner in owners:
        if hasattr(owner, "get_rope_index"):
            return cast(RopeIndex, owner.get_rope_index)
    return None


def _checkpoint_file(path: str, name: str) -> Path | None:
    """A file of a checkpoint folder or of a hub name; None where it has no such file."""
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _processor_template(path: str) -> str:
    """The chat template of checkpoints that keep it apart from the tokenizer."""
    file = _checkpoint_file(path, "chat_template.json")
    if file is None:
        raise ValueError(f"{path}: neither the tokenizer nor chat_template.json has a template")
    return str(json.loads(file.read_text())["chat_template"])


def _stop_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a chat turn first, then the ends named by generation config and tokenizer."""
    found: list[Any] = []
    if TURN_END in tokenizer.get_vocab():
        found.append(tokenizer.convert_tokens_to_ids(TURN_END))
    found.append(tokenizer.eos_token_id)
    if _checkpoint_file(path, "generation_config.json"):
        ends = GenerationConfig.from_pretrained(path).eos_token_id
        found += ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(int(i) for i in found if i is not None))


def _image_id(config: PreTrainedConfig) -> int:
    ident = getattr(config, "image_token_id", None)
    if ident is None:
        raise ValueError(f"{config.model_type}: no image_token_id in config.json, not a Qwen-VL")
    return int(ident)


def _banned_ids(config: PreTrainedConfig) -> list[int]:
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [int(i) for i in ids if i is not None]
