"""How a scene looks: 48 x 48 pixels of flat shapes, a sign with bitmap letters, evening light, a little grain."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from .scenes import NOTHING, Scene

SIZE = 48
_GRAIN = 5.0  # standard deviation of the camera grain, in 8-bit levels
_COLOUR_JITTER = 14
# Steps of one patch plus a pixel of jitter: a model this small learns to see in minutes because shapes recur.
_OBJECT_LEFTS = (5, 13, 21, 28)
_OBJECT_TOP = 29
_SIGN_LEFTS = (2, 10, 18)
_SIGN_TOP = 2
# Evening light: a factor per colour channel.
_DUSK = np.array([0.42, 0.40, 0.62], dtype=np.float32)

Colour = tuple[int, int, int]
# Sky or wall above the horizon, ground or floor below.
_GROUND: dict[str, tuple[Colour, Colour]] = {
    "track": ((190, 215, 235), (200, 90, 60)),
    "park": ((150, 205, 240), (80, 170, 80)),
    "cliff": ((120, 150, 200), (110, 85, 65)),
    "road": ((170, 170, 175), (70, 70, 75)),
    "kitchen": ((240, 225, 190), (180, 130, 90)),
    "lab": ((225, 235, 245), (150, 190, 200)),
    "beach": ((110, 200, 235), (235, 215, 150)),
    "forest": ((60, 110, 70), (70, 80, 40)),
    "workshop": ((200, 180, 160), (120, 110, 120)),
}
# 5 x 7 letters, one row of bits per line.
_LETTERS: dict[str, tuple[int, ...]] = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (31, 4, 4, 4, 4, 4, 31),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 21, 21, 19, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "Y": (17, 17, 10, 4, 4, 4, 4),
}
_LETTER_WIDTH, _LETTER_HEIGHT = 5, 7


def render(scene: Scene) -> Image.Image:
    """Return the scene's picture, RGB, 48 x 48; the same scene always gives the same pixels."""
    rng = random.Random(scene.layout_seed)
    horizon = rng.randint(18, 21)
    sky, ground = (_jitter(colour, rng) for colour in _GROUND[scene.place])
    image = Image.new("RGB", (SIZE, SIZE), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, SIZE, SIZE), fill=ground)
    _PLACE_DETAILS[scene.place](draw, horizon)
    if scene.object != NOTHING:
        _OBJECT_SHAPES[scene.object](draw, *_position(_OBJECT_LEFTS, _OBJECT_TOP, rng))
    if scene.sign is not None:
        _draw_sign(draw, scene.sign, *_position(_SIGN_LEFTS, _SIGN_TOP, rng))
    pixels = np.asarray(image, dtype=np.float32)
    if scene.dusk:
        pixels = pixels * _DUSK
    grain = np.random.default_rng(scene.layout_seed).normal(0.0, _GRAIN, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).round().astype(np.uint8))


def _position(lefts: tuple[int, ...], top: int, rng: random.Random) -> tuple[int, int]:
    return rng.choice(lefts) + rng.randint(-1, 1), top + rng.randint(-1, 1)


def _jitter(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (max(0, min(255, c + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for c in colour)
    return red, green, blue


def _draw_sign(draw: ImageDraw.ImageDraw, word: str, left: int, top: int) -> None:
    """Draw a white board with dark letters; its corner lies at (left, top)."""
    width = len(word) * (_LETTER_WIDTH + 1) + 3
    draw.rectangle((left, top, left + width, top + _LETTER_HEIGHT + 3), fill=(250, 250, 240), outline=(90, 60, 40))
    for place, letter in enumerate(word):
        x0 = left + 2 + place * (_LETTER_WIDTH + 1)
        for row, bits in enumerate(_LETTERS[letter]):
            for column in range(_LETTER_WIDTH):
                if bits >> (_LETTER_WIDTH - 1 - column) & 1:
                    draw.point((x0 + column, top + 2 + row), fill=(20, 20, 30))


def _track(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    for lane in range(4):
        draw.line((0, horizon + 4 + lane * 7, SIZE, horizon + 6 + lane * 7), fill=(255, 255, 255))


def _park(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    draw.rectangle((40, horizon - 6, 42, horizon + 6), fill=(100, 70, 40))
    draw.ellipse((34, horizon - 16, 47, horizon - 3), fill=(50, 140, 60))


def _cliff(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    draw.polygon(((26, horizon), (SIZE, horizon), (SIZE, SIZE), (36, SIZE)), fill=(60, 90, 140))
    draw.line((26, horizon, 36, SIZE), fill=(40, 30, 25), width=2)


def _road(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    for dash in range(3):
        draw.rectangle((2 + dash * 16, horizon + 12, 10 + dash * 16, horizon + 14), fill=(250, 220, 60))


def _kitchen(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    for left in (2, 17, 32):
        draw.rectangle((left, horizon - 12, left + 12, horizon - 3), fill=(210, 160, 110), outline=(90, 60, 40))


def _lab(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    for left, colour in ((4, (120, 220, 160)), (18, (230, 120, 200)), (32, (120, 160, 240))):
        draw.polygon(((left, horizon), (left + 10, horizon), (left + 5, horizon - 12)), fill=colour)


def _beach(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    draw.rectangle((0, horizon - 5, SIZE, horizon), fill=(30, 110, 200))
    draw.ellipse((36, 2, 46, 12), fill=(255, 240, 120))


def _forest(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    for left in (2, 14, 26, 38):
        draw.polygon(((left - 3, horizon), (left + 3, horizon - 18), (left + 9, horizon)), fill=(25, 70, 35))
        draw.rectangle((left + 2, horizon, left + 4, horizon + 5), fill=(80, 55, 35))


def _workshop(draw: ImageDraw.ImageDraw, horizon: int) -> None:
    draw.rectangle((0, horizon - 4, SIZE, horizon), fill=(150, 95, 50))
    for left in (6, 20, 34):
        draw.rectangle((left, horizon - 14, left + 2, horizon - 7), fill=(200, 60, 40))
        draw.rectangle((left - 2, horizon - 16, left + 4, horizon - 14), fill=(90, 90, 100))


def _ball(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.ellipse((x, y, x + 12, y + 12), fill=(255, 255, 255), outline=(0, 0, 0))
    draw.ellipse((x + 4, y + 4, x + 8, y + 8), fill=(0, 0, 0))


def _child(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.rectangle((x + 2, y + 1, x + 10, y + 14), fill=(250, 90, 170))
    draw.ellipse((x + 2, y - 7, x + 10, y + 1), fill=(250, 210, 180), outline=(110, 70, 40))


def _dog(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.ellipse((x, y + 3, x + 14, y + 11), fill=(140, 90, 40))
    draw.ellipse((x + 10, y - 3, x + 17, y + 5), fill=(140, 90, 40))
    for left in (x + 2, x + 10):
        draw.rectangle((left, y + 9, left + 2, y + 14), fill=(100, 60, 25))


def _cat(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.ellipse((x + 1, y + 3, x + 13, y + 14), fill=(250, 160, 60))
    draw.ellipse((x + 2, y - 5, x + 12, y + 5), fill=(250, 160, 60))
    draw.polygon(((x + 2, y), (x + 3, y - 9), (x + 6, y - 4)), fill=(250, 160, 60))
    draw.polygon(((x + 12, y), (x + 11, y - 9), (x + 8, y - 4)), fill=(250, 160, 60))


def _carrot(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.polygon(((x, y), (x + 17, y + 4), (x, y + 8)), fill=(255, 120, 20))
    draw.rectangle((x - 4, y + 1, x, y + 7), fill=(40, 190, 60))


def _bread(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.rounded_rectangle((x, y, x + 17, y + 10), radius=4, fill=(215, 160, 90), outline=(120, 70, 30))
    for left in (4, 8, 12):
        draw.line((x + left, y + 2, x + left + 2, y + 8), fill=(250, 230, 190))


def _candle(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.rectangle((x + 3, y + 1, x + 9, y + 14), fill=(250, 250, 235), outline=(180, 180, 170))
    draw.ellipse((x + 3, y - 8, x + 9, y), fill=(255, 200, 0))


def _lantern(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.rectangle((x + 1, y - 2, x + 12, y + 13), fill=(40, 40, 50))
    draw.rectangle((x + 3, y + 2, x + 10, y + 9), fill=(255, 240, 130))
    draw.arc((x + 2, y - 8, x + 11, y + 2), 180, 360, fill=(40, 40, 50))


def _haystack(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.pieslice((x - 2, y - 6, x + 17, y + 26), 180, 360, fill=(225, 190, 60), outline=(150, 110, 20))
    for left in (3, 8, 12):
        draw.line((x + left, y, x + left, y + 8), fill=(150, 110, 20))


def _snake(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for bend in range(3):
        left = x + bend * 6
        draw.arc((left - 1, y + 2, left + 7, y + 12), 180 if bend % 2 else 0, 0 if bend % 2 else 180, (30, 160, 40), 3)
    draw.ellipse((x + 14, y - 1, x + 19, y + 5), fill=(200, 220, 30))


def _bear(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.ellipse((x, y - 1, x + 15, y + 15), fill=(50, 30, 25))
    draw.ellipse((x + 2, y - 9, x + 13, y + 2), fill=(50, 30, 25))
    draw.ellipse((x + 5, y - 4, x + 10, y + 1), fill=(190, 150, 110))


_Drawer = Callable[[ImageDraw.ImageDraw, int], None]
_PLACE_DETAILS: dict[str, _Drawer] = {
    "track": _track,
    "park": _park,
    "cliff": _cliff,
    "road": _road,
    "kitchen": _kitchen,
    "lab": _lab,
    "beach": _beach,
    "forest": _forest,
    "workshop": _workshop,
}
_OBJECT_SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, int, int], None]] = {
    "ball": _ball,
    "child": _child,
    "dog": _dog,
    "cat": _cat,
    "carrot": _carrot,
    "bread": _bread,
    "candle": _candle,
    "lantern": _lantern,
    "haystack": _haystack,
    "snake": _snake,
    "bear": _bear,
}
