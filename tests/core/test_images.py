"""Images that are opened, and images that must be refused."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speciarl.core.examples import BadImage, open_image


def picture(seed: int = 0, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA"])
def test_open_image_is_rgb(tmp_path: Path, mode: str) -> None:
    original = picture(mode=mode)
    opened = open_image(saved(tmp_path / "a.png", original))
    assert (opened.mode, opened.size) == ("RGB", (24, 16))
    assert np.array_equal(opened, original.convert("RGB"))


def test_open_image_lays_transparency_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (9, 9), (10, 20, 30, 0))
    assert open_image(saved(tmp_path / "a.png", clear)).getpixel((4, 4)) == (255, 255, 255)
    keyed = Image.new("RGB", (9, 9), (10, 20, 30))
    path = saved(tmp_path / "b.png", keyed, transparency=(10, 20, 30))
    assert open_image(path).getpixel((4, 4)) == (255, 255, 255)


def test_open_image_turns_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(saved(tmp_path / "a.jpg", picture(), exif=exif)).size == (16, 24)


def test_open_image_takes_a_camera_picture_with_previews(tmp_path: Path) -> None:
    frames = [picture(1), picture(2)]
    path = saved(
        tmp_path / "a.jpg", frames[0], format="MPO", save_all=True, append_images=frames[1:]
    )
    assert open_image(path).size == (24, 16)


def test_open_image_limits_are_inclusive(tmp_path: Path) -> None:
    assert open_image(saved(tmp_path / "a.png", picture(size=(8, 8)))).size == (8, 8)
    wide = Image.new("RGB", (1600, 8))
    assert open_image(saved(tmp_path / "b.png", wide)).size == (1600, 8)


def jpeg_bytes(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    picture(size=size).save(file, "JPEG")
    return file.getvalue()


def animation(path: Path) -> None:
    frames = [picture(1), picture(2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path, "PNG")


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("gone.jpg", lambda path: None, "no such file"),
    ("folder.jpg", lambda path: path.mkdir(), "unreadable: "),
    ("empty.jpg", lambda path: path.touch(), "zero bytes"),
    ("text.jpg", lambda path: path.write_text("not an image"), "unreadable: Unidentified"),
    ("half.jpg", lambda path: path.write_bytes(jpeg_bytes()[:900]), "unreadable: .*truncated"),
    ("head.jpg", lambda path: path.write_bytes(jpeg_bytes()[:20]), "unreadable: "),
    ("pixel.png", lambda path: picture(size=(1, 1)).save(path), "tiny: 1 x 1"),
    ("narrow.png", lambda path: picture(size=(7, 90)).save(path), "tiny: 7 x 90"),
    ("strip.png", lambda path: picture(size=(1601, 8)).save(path), "aspect ratio over 200"),
    ("moving.gif", animation, "animated"),
    ("moving.png", animation, "animated"),
    ("moving.webp", animation, "animated"),
    ("print.jpg", lambda path: picture(mode="CMYK").save(path), "CMYK"),
    ("deep.png", sixteen_bit, "pixel mode I;16"),
]


@pytest.mark.parametrize(("name", "write", "reason"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_images(
    tmp_path: Path, name: str, write: Callable[[Path], object], reason: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(tmp_path / name)
    assert caught.value.path == tmp_path / name
    assert str(caught.value) == f"{caught.value.path}: {caught.value.reason}"


def test_bad_image_travels_between_processes() -> None:
    error = BadImage(Path("a.jpg"), "zero bytes")
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.reason) == (error.path, error.reason)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4), st.integers(1, 9)
)
def test_damaged_bytes_give_an_image_or_a_bad_image(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], tenths: int
) -> None:
    damaged = bytearray(jpeg_bytes())
    for position, value in edits:
        damaged[position % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(damaged if tenths == 9 else damaged[: len(damaged) * tenths // 9])
    try:
        assert open_image(path).mode == "RGB"
    except BadImage as error:
        assert error.reason
