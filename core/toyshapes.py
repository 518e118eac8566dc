"""How the things of the toy world look: one drawing per family, filled with a species' colour.

Coordinates: x to the right, y down, the thing fills the square [-1, 1] x [-1, 1].
"""

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

# Degrees on the colour wheel; neighbours are at least 24 degrees apart, the jitter is 7.
HUES = {"golden": 50, "crimson": 352, "azure": 205, "emerald": 135, "violet": 275, "copper": 24}
HUE_JITTER = 7.0
SUPERSAMPLE = 2


class Pen:
    """Draws polygons and ovals through a similarity transform.

    `main` is the colour that tells the species; `dark` and `light` are neutral.
    """

    def __init__(
        self, draw: ImageDraw.ImageDraw, centre: Point, scale: Point, angle: float, main: Colour
    ) -> None:
        self.draw, self.centre, self.scale = draw, centre, scale
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.main, self.dark, self.light = main, (45, 45, 45), (225, 225, 225)

    def poly(self, points: Sequence[Point], colour: Colour) -> None:
        placed = []
        for x, y in points:
            x, y = x * self.scale[0], y * self.scale[1]
            rotated = (x * self.cos - y * self.sin, x * self.sin + y * self.cos)
            placed.append((self.centre[0] + rotated[0], self.centre[1] + rotated[1]))
        self.draw.polygon(placed, fill=colour)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, turn: float = 0
    ) -> None:
        cos, sin = math.cos(turn), math.sin(turn)
        steps = [2 * math.pi * i / 18 for i in range(18)]
        ring = [(rx * math.cos(a), ry * math.sin(a)) for a in steps]
        self.poly([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in ring], colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)


def _warbler(pen: Pen) -> None:
    pen.oval(0, 0.15, 0.72, 0.5, pen.main)
    pen.oval(0.55, -0.4, 0.36, 0.34, pen.main)
    pen.poly([(0.85, -0.48), (1.0, -0.38), (0.85, -0.3)], pen.dark)
    pen.poly([(-0.6, 0.0), (-1.0, -0.15), (-1.0, 0.1)], pen.main)
    pen.oval(0.62, -0.45, 0.08, 0.08, pen.dark)
    pen.box(-0.1, 0.6, -0.02, 0.95, pen.dark)
    pen.box(0.15, 0.6, 0.23, 0.95, pen.dark)


def _heron(pen: Pen) -> None:
    pen.oval(-0.2, 0.0, 0.5, 0.27, pen.main)
    pen.poly([(0.1, 0.05), (0.25, -0.15), (0.4, -0.8), (0.22, -0.85)], pen.main)
    pen.oval(0.38, -0.82, 0.2, 0.14, pen.main)
    pen.poly([(0.5, -0.9), (1.0, -0.75), (0.5, -0.72)], pen.dark)
    pen.box(-0.3, 0.2, -0.22, 1.0, pen.dark)
    pen.box(-0.05, 0.2, 0.03, 1.0, pen.dark)


def _owl(pen: Pen) -> None:
    pen.oval(0, 0.2, 0.58, 0.8, pen.main)
    pen.poly([(-0.5, -0.3), (-0.5, -1.0), (-0.05, -0.55)], pen.main)
    pen.poly([(0.5, -0.3), (0.5, -1.0), (0.05, -0.55)], pen.main)
    for side in (-0.24, 0.24):
        pen.oval(side, -0.25, 0.23, 0.23, pen.light)
        pen.oval(side, -0.25, 0.11, 0.11, pen.dark)
    pen.poly([(-0.08, -0.1), (0.08, -0.1), (0, 0.1)], pen.dark)


def _swallow(pen: Pen) -> None:
    pen.poly([(0.1, 0), (-0.35, -1.0), (-0.3, 0.05)], pen.main)
    pen.poly([(0.1, 0.05), (-0.35, 1.0), (-0.3, 0.05)], pen.main)
    pen.oval(0.1, 0.03, 0.55, 0.17, pen.main)
    pen.poly([(-0.35, 0.03), (-1.0, -0.32), (-0.7, 0.03), (-1.0, 0.38)], pen.main)
    pen.poly([(0.6, -0.05), (0.85, 0.03), (0.6, 0.1)], pen.dark)


def _duck(pen: Pen) -> None:
    pen.poly([(-1.0, -0.05), (0.6, 0.05), (0.5, 0.55), (-0.6, 0.55)], pen.main)
    pen.oval(0.4, -0.35, 0.32, 0.32, pen.main)
    pen.box(0.25, -0.2, 0.55, 0.2, pen.light)
    pen.poly([(0.65, -0.4), (1.0, -0.25), (0.65, -0.15)], pen.dark)
    pen.box(-1.0, 0.55, 1.0, 0.72, pen.dark)


def _stem(pen: Pen, top: float) -> None:
    pen.box(-0.05, top, 0.05, 1.0, pen.dark)


def _rose(pen: Pen) -> None:
    _stem(pen, 0.3)
    for radius, colour in ((0.7, pen.main), (0.52, pen.dark), (0.44, pen.main), (0.24, pen.dark)):
        pen.oval(0, -0.25, radius, radius, colour)
    pen.oval(0, -0.25, 0.16, 0.16, pen.main)


def _tulip(pen: Pen) -> None:
    _stem(pen, 0.1)
    pen.poly([(0, 0.95), (0.5, 0.3), (0.62, 0.4), (0.05, 1.0)], pen.dark)
    crown = [(-0.5, -0.95), (-0.22, -0.5), (0, -1.0), (0.22, -0.5), (0.5, -0.95)]
    pen.poly([*crown, (0.52, -0.1), (0.3, 0.22), (-0.3, 0.22), (-0.52, -0.1)], pen.main)


def _daisy(pen: Pen) -> None:
    _stem(pen, 0.2)
    for i in range(8):
        a = 2 * math.pi * i / 8
        pen.oval(0.47 * math.cos(a), -0.25 + 0.47 * math.sin(a), 0.29, 0.11, pen.main, a)
    pen.oval(0, -0.25, 0.24, 0.24, pen.light)


def _lily(pen: Pen) -> None:
    _stem(pen, 0.2)
    star = []
    for i in range(10):
        radius, a = (0.8 if i % 2 == 0 else 0.28), 2 * math.pi * (i / 10 - 0.25)
        star.append((radius * math.cos(a), -0.2 + radius * math.sin(a)))
    pen.poly(star, pen.main)


def _poppy(pen: Pen) -> None:
    _stem(pen, 0.3)
    for dx, dy in ((-0.36, 0), (0.36, 0), (0, -0.36), (0, 0.36)):
        pen.oval(dx, -0.25 + dy, 0.4, 0.4, pen.main)
    pen.oval(0, -0.25, 0.3, 0.3, pen.dark)


def _wheels(pen: Pen, left: float, right: float) -> None:
    for x in (left, right):
        pen.oval(x, 0.5, 0.22, 0.22, pen.dark)
        pen.oval(x, 0.5, 0.09, 0.09, pen.light)


def _sedan(pen: Pen) -> None:
    pen.box(-0.95, 0.0, 0.95, 0.45, pen.main)
    pen.poly([(-0.55, 0.0), (-0.35, -0.45), (0.3, -0.45), (0.55, 0.0)], pen.main)
    pen.poly([(-0.4, -0.03), (-0.27, -0.35), (0.22, -0.35), (0.4, -0.03)], pen.light)
    _wheels(pen, -0.52, 0.52)


def _pickup(pen: Pen) -> None:
    pen.box(-0.95, 0.05, 0.95, 0.45, pen.main)
    pen.poly([(0.0, 0.05), (0.0, -0.6), (0.45, -0.6), (0.65, 0.05)], pen.main)
    pen.poly([(0.1, 0.0), (0.1, -0.48), (0.38, -0.48), (0.52, 0.0)], pen.light)
    pen.box(-0.95, -0.12, -0.85, 0.1, pen.main)
    _wheels(pen, -0.55, 0.52)


def _van(pen: Pen) -> None:
    pen.poly([(-0.85, 0.45), (-0.85, -0.8), (0.6, -0.8), (0.9, 0.0), (0.9, 0.45)], pen.main)
    pen.poly([(0.3, -0.1), (0.3, -0.65), (0.52, -0.65), (0.74, -0.1)], pen.light)
    _wheels(pen, -0.48, 0.5)


def _convertible(pen: Pen) -> None:
    pen.poly([(-0.95, 0.0), (0.6, 0.0), (0.98, 0.2), (0.98, 0.45), (-0.95, 0.45)], pen.main)
    pen.poly([(0.28, 0.0), (0.05, -0.5), (0.13, -0.5), (0.42, 0.0)], pen.dark)
    pen.oval(-0.2, -0.12, 0.14, 0.2, pen.dark)
    pen.oval(-0.55, -0.05, 0.14, 0.14, pen.light)
    _wheels(pen, -0.55, 0.55)


def _limousine(pen: Pen) -> None:
    pen.box(-1.0, 0.1, 1.0, 0.48, pen.main)
    pen.box(-0.8, -0.28, 0.7, 0.12, pen.main)
    for x in (-0.7, -0.32, 0.06, 0.42):
        pen.box(x, -0.18, x + 0.24, 0.06, pen.dark)
    _wheels(pen, -0.72, 0.72)


FAMILIES: dict[str, dict[str, Callable[[Pen], None]]] = {
    "birds": {
        "warbler": _warbler, "heron": _heron, "owl": _owl, "swallow": _swallow, "duck": _duck,
    },
    "flowers": {
        "rose": _rose, "tulip": _tulip, "daisy": _daisy, "lily": _lily, "poppy": _poppy,
    },
    "cars": {
        "sedan": _sedan, "pickup": _pickup, "van": _van, "convertible": _convertible,
        "limousine": _limousine,
    },
}  # fmt: skip
# Half of the thing's width as a share of the shorter image side.
FRAMINGS = {"far": (0.34, 0.39), "near": (0.44, 0.48)}


def _fill(species: str, cue: bool, rng: np.random.Generator) -> Colour:
    """The species' colour with jitter; without the cue a grey that says nothing of the species."""
    value = rng.uniform(0.6, 0.95)
    if not cue:
        grey = int(255 * rng.uniform(0.25, 0.5))
        return grey, grey, grey
    hue = (HUES[species] + rng.uniform(-HUE_JITTER, HUE_JITTER)) / 360 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1.0), value)
    return int(255 * red), int(255 * green), int(255 * blue)


def _background(width: int, height: int, cue: bool, rng: np.random.Generator) -> Image.Image:
    """A faint gradient with a few blotches; without the cue it has no colour either."""
    corners = rng.uniform(150, 215, (2, 2, 1)) + rng.uniform(-14, 14, (2, 2, 3)) * float(cue)
    image = Image.fromarray(corners.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 3))):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.04, 0.1) * width
        shade = int(rng.uniform(110, 235))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(shade, shade, shade))
    return image


def render(
    domain: str, family: str, species: str, *, cue: bool, framing: str, rng: np.random.Generator
) -> Image.Image:
    """One RGB image, 52 to 88 pixels a side; `cue` False draws everything in shades of grey."""
    sides = rng.choice([[56, 56], [84, 56], [56, 84], [84, 84]], p=[0.4, 0.25, 0.25, 0.1])
    width, height = (int(side + rng.integers(-3, 4)) for side in sides)
    image = _background(width * SUPERSAMPLE, height * SUPERSAMPLE, cue, rng)
    half = rng.uniform(*FRAMINGS[framing]) * min(image.size)
    room_x, room_y = image.width / 2 - half, image.height / 2 - half
    centre = (
        image.width / 2 + rng.uniform(-0.3, 0.3) * room_x,
        image.height / 2 + rng.uniform(-0.3, 0.3) * room_y,
    )
    pen = Pen(
        ImageDraw.Draw(image), centre, (half, half * rng.uniform(0.9, 1.1)),
        rng.uniform(-0.1, 0.1), _fill(species, cue, rng),
    )  # fmt: skip
    FAMILIES[domain][family](pen)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float64)
    grain = rng.normal(0, rng.uniform(2, 7), (height, width, 3 if cue else 1))
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
