"""Images opened with care: what a model cannot use is refused, with the reason."""

from pathlib import Path

from PIL import Image, ImageOps

SMALLEST_SIDE = 8  # pixels; below it no patch of a vision tower carries anything
WIDEST_ASPECT = 200  # the limit of Qwen2-VL's image processor, which raises above it
_TRANSPARENT_MODES = frozenset(("LA", "PA", "RGBA"))
_MODES = _TRANSPARENT_MODES | {"1", "L", "P", "RGB", "YCbCr"}


class BadImage(Exception):
    """An image that cannot be used. `path` and `reason` say which and why; skip it and count it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_image(path: Path) -> Image.Image:
    """The image as RGB, fully decoded and turned upright; transparency is laid on white.

    Raises BadImage if it is missing, empty, not an image, truncated, animated, CMYK or of more
    than 8 bits a channel (a plain conversion would clip it), under 8 pixels a side, or over 200
    times as long as wide.
    """
    try:
        if path.stat().st_size == 0:
            raise BadImage(path, "zero bytes")
        with Image.open(path) as image:
            if reason := _unusable(image):
                raise BadImage(path, reason)
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except Exception as error:  # Pillow's decoders raise nearly every built-in error on bad bytes
        raise BadImage(path, f"unreadable: {type(error).__name__}: {error}") from error


def _unusable(image: Image.Image) -> str:
    width, height = image.size
    # MPO is the JPEG of many cameras: its further frames are previews, not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "animated"
    if image.mode == "CMYK":
        return "CMYK"
    if image.mode not in _MODES:
        return f"pixel mode {image.mode}, not 8 bits a channel"
    if min(width, height) < SMALLEST_SIDE:
        return f"tiny: {width} x {height} pixels"
    if max(width, height) > WIDEST_ASPECT * min(width, height):
        return f"aspect ratio over {WIDEST_ASPECT}: {width} x {height} pixels"
    return ""


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in _TRANSPARENT_MODES and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(paper, layer).convert("RGB")
