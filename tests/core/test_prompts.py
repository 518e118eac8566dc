"""Prompts equal what the stock processor and the model's own class make of the same image."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)

from speciarl.core.examples import BadImage, Example
from speciarl.core.prompts import INSTRUCTION, QUESTIONS, PromptBuilder, PromptTooLong
from speciarl.core.toymodel import SPECIAL, TOY_INSTRUCTION, save_toymodel, toy_tokenizer, toy_words
from speciarl.core.toyworld import DOMAINS, taxonomy

SIZES = ((56, 56), (84, 60), (53, 87), (84, 84), (300, 120))
PROCESSORS: dict[str, Any] = {"toy": Qwen2_5_VLProcessor, "qwen3": Qwen3VLProcessor}
VLMS = sorted(PROCESSORS)


def picture(folder: Path, size: tuple[int, int]) -> Example:
    path = folder / f"{size[0]}x{size[1]}.png"
    noise = np.random.default_rng(size).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return Example(f"birds/{path.name}", path, "Golden warbler", "birds", "birds")


def stock_processor(kind: str, builder: PromptBuilder) -> Any:
    class ImageOnly(PROCESSORS[kind]):  # type: ignore[misc]
        """The stock one without its video processor, which needs torchvision."""

        def check_argument_for_proper_class(self, name: str, arg: Any) -> Any:
            if name == "video_processor":
                return type(arg)
            return super().check_argument_for_proper_class(name, arg)

    return ImageOnly(
        image_processor=builder.image_processor, tokenizer=builder.tokenizer,
        video_processor=None, chat_template=builder.tokenizer.chat_template,
    )  # fmt: skip


@pytest.mark.parametrize("kind", VLMS)
@pytest.mark.parametrize("variant", QUESTIONS)
def test_ids_and_pixels_equal_the_stock_processor(
    kind: str, variant: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    builder = PromptBuilder(model_dirs[kind], variant=variant)
    stock = stock_processor(kind, builder)
    text = f"{QUESTIONS[variant]} {INSTRUCTION}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = stock.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    for size in SIZES:
        example = picture(tmp_path, size)
        prompt = builder.build(example)
        expected = stock(text=[chat], images=[Image.open(example.image)], return_tensors="pt")
        assert torch.equal(prompt.input_ids, expected["input_ids"][0])
        assert prompt.images.keys() == {"pixel_values", "image_grid_thw"}
        for name, value in prompt.images.items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        assert (prompt.key, prompt.truth, prompt.domain) == (
            example.key, example.truth, "birds"
        )  # fmt: skip


@pytest.mark.parametrize("kind", VLMS)
def test_positions_equal_rope_index_of_prompt_and_completion(
    kind: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    builder = PromptBuilder(model_dirs[kind], instruction=TOY_INSTRUCTION)
    model: Any = AutoModelForImageTextToText.from_pretrained(model_dirs[kind])
    answer = torch.tensor(builder.completion_ids("<answer> golden warbler</answer>"))
    for size in SIZES:
        prompt = builder.build(picture(tmp_path, size))
        whole = torch.cat([prompt.input_ids, answer])
        expected, _ = model.model.get_rope_index(
            input_ids=whole[None],
            mm_token_type_ids=(whole == builder.image_id).int()[None],
            image_grid_thw=prompt.images["image_grid_thw"],
        )
        after = prompt.next_position + torch.arange(len(answer))
        assert torch.equal(prompt.positions, expected[:, 0, : len(prompt.input_ids)])
        assert torch.equal(after.expand(3, -1), expected[:, 0, len(prompt.input_ids) :])
        assert prompt.next_position <= len(prompt.input_ids)


def test_without_images_or_mrope_positions_count_up(toy_model_dir: Path) -> None:
    builder = PromptBuilder(toy_model_dir)
    ids = torch.tensor([5, 6, 7, 8])
    grid = torch.tensor([[1, 4, 4]])
    assert builder.positions(ids, None).tolist() == [[0, 1, 2, 3]] * 3
    builder._rope_index = None
    assert builder.positions(ids, grid).tolist() == [[0, 1, 2, 3]] * 3


def test_model_sees_the_prompt_as_through_the_stock_inputs(
    toy_model_dir: Path, tmp_path: Path
) -> None:
    builder = PromptBuilder(toy_model_dir, instruction=TOY_INSTRUCTION)
    prompt = builder.build(picture(tmp_path, (84, 56)))
    model: Any = AutoModelForImageTextToText.from_pretrained(toy_model_dir)
    ids = prompt.input_ids[None]
    kinds = (ids == builder.image_id).int()
    with torch.no_grad():
        ours = model(input_ids=ids, position_ids=prompt.positions[:, None], **prompt.images).logits
        stock = model(input_ids=ids, mm_token_type_ids=kinds, **prompt.images).logits
    torch.testing.assert_close(ours, stock)


def test_too_long_is_an_error_and_never_cut(toy_model_dir: Path, tmp_path: Path) -> None:
    example = picture(tmp_path, (84, 84))
    whole = len(PromptBuilder(toy_model_dir).build(example).input_ids)
    assert len(PromptBuilder(toy_model_dir, max_prompt_tokens=whole).build(example).input_ids)
    with pytest.raises(PromptTooLong, match=rf"birds/84x84.png: {whole} tokens.*{whole - 1}"):
        PromptBuilder(toy_model_dir, max_prompt_tokens=whole - 1).build(example)


def test_bad_images_and_variants_are_named(toy_model_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    with pytest.raises(BadImage, match="empty.jpg"):
        PromptBuilder(toy_model_dir).build(Example("a", empty, "x", "birds", "birds"))
    with pytest.raises(ValueError, match="'specific': known are general, be-specific"):
        PromptBuilder(toy_model_dir, variant="specific")


def test_a_template_that_drops_the_image_is_refused(tmp_path: Path) -> None:
    folder = save_toymodel(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(ValueError, match="renders 0 image placeholders"):
        PromptBuilder(folder)
    with pytest.raises(ValueError, match="renders 2 image placeholders"):
        PromptBuilder(save_toymodel(tmp_path / "second"), instruction="<|image_pad|>")


def test_a_template_kept_beside_the_tokenizer_is_found(tmp_path: Path) -> None:
    folder = save_toymodel(tmp_path / "model")
    whole = PromptBuilder(folder).template_ids
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    assert PromptBuilder(folder).template_ids == whole


def test_stop_and_banned_ids(toy_model_dir: Path) -> None:
    builder = PromptBuilder(toy_model_dir)
    tokens = builder.tokenizer.convert_ids_to_tokens
    assert tokens(builder.stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    assert tokens(builder.banned_ids) == ["<|image_pad|>", "<|video_pad|>"]


def test_completions_decode_to_their_text(toy_model_dir: Path) -> None:
    builder = PromptBuilder(toy_model_dir)
    text = "<think>É blue</think><answer> golden warbler</answer>"
    ids = builder.completion_ids(text)
    assert builder.decode(ids) == text
    assert ids[-1] == builder.stop_ids[0]
    assert len(builder.completion_ids("<answer> golden warbler</answer>")) == 5
    with pytest.raises(ValueError, match="placeholder"):
        builder.completion_ids("<answer><|image_pad|></answer>")


def test_a_toy_prompt_is_short(toy_model_dir: Path, tmp_path: Path) -> None:
    builder = PromptBuilder(toy_model_dir, instruction=TOY_INSTRUCTION)
    lengths = [len(builder.build(picture(tmp_path, size)).input_ids) for size in SIZES]
    assert lengths[0] + 5 == lengths[3] == 30
    assert max(lengths) <= 30


def test_save_makes_a_folder_that_builds_the_same_prompts(
    toy_model_dir: Path, tmp_path: Path
) -> None:
    builder = PromptBuilder(toy_model_dir)
    copy = tmp_path / "copy"
    copy.mkdir()
    builder.save(copy)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(toy_model_dir / name, copy / name)
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "Qwen2VLImageProcessor"
    example = picture(tmp_path, (84, 60))
    first, second = builder.build(example), PromptBuilder(copy).build(example)
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.images["pixel_values"], second.images["pixel_values"])


def test_toy_checkpoint_is_the_same_for_a_seed_and_small(
    toy_model_dir: Path, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    folders = [save_toymodel(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1))]
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    model: Any = AutoModelForImageTextToText.from_pretrained(folders[0])
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 0.9e6
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    assert not AutoConfig.from_pretrained(folders[0]).tie_word_embeddings


def test_toy_tokenizer_knows_the_words_and_round_trips_any_text(toy_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model_dir)
    assert tokenizer.get_vocab() == toy_tokenizer().get_vocab()
    for node in taxonomy()["nodes"]:
        for name in (node["name"], node["name"].capitalize()):
            assert len(tokenizer(f" {name}")["input_ids"]) == len(name.split())
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in toy_words())
    for tag in (*SPECIAL, "<think>", "</think>", "<answer>", "</answer>"):
        assert len(tokenizer(tag)["input_ids"]) == 1
    for text in ("Zyzzyva's  naïve\n\tÆrø 鶯 42 🐦", *DOMAINS.values(), "Parus major (L.)"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
