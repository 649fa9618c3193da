"""Pictures to pick: handwritten digits and photographs of scikit-learn, and a few drawn here with plain shapes."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE, SCALE = 128, 4  # drawn four times as large, for smooth edges
Colour = tuple[int, int, int]


def examples(channels: int) -> list[Image.Image]:
    """Ten handwritten digits for networks in grey; photographs and drawings for those in colour."""
    return digits() if channels == 1 else [*photographs(), *drawings()]


def digits() -> list[Image.Image]:
    """One of each of scikit-learn's handwritten digits, dark on light, out of every fifth: those of the test set."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        return []
    data = datasets.load_digits()
    chosen = [5 * int(np.flatnonzero(data.target[::5] == digit)[0]) for digit in range(10)]
    return [
        Image.fromarray((255 - data.images[index] * 15.9).astype(np.uint8)).resize((96, 96), Image.Resampling.BOX)
        for index in chosen
    ]


def photographs() -> list[Image.Image]:
    """Square crops of scikit-learn's two sample photographs: a pavilion, and a flower."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        return []
    pavilion, flower = (Image.fromarray(picture) for picture in datasets.load_sample_images().images)
    return [
        pavilion.crop((0, 0, 427, 427)).resize((256, 256), Image.Resampling.LANCZOS),
        flower.crop((150, 40, 500, 390)).resize((256, 256), Image.Resampling.LANCZOS),
    ]


def drawings() -> list[Image.Image]:
    """An orange, the sea, a mountain, a mushroom, a rocket and a cloud."""
    return [orange(), sea(), mountain(), mushroom(), rocket(), cloud()]


def gradient(top: Colour, bottom: Colour, noise: float = 4.0) -> Image.Image:
    """A ground that runs from one colour to another, slightly grained like a photograph."""
    size = SIDE * SCALE
    share = np.linspace(0, 1, size)[:, None, None]
    pixels = (1 - share) * np.array(top) + share * np.array(bottom)
    grain = np.random.default_rng(0).normal(0, noise, (SIDE, SIDE, 1)).repeat(SCALE, 0).repeat(SCALE, 1)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8), "RGB")


def finish(picture: Image.Image, blur: float = 3) -> Image.Image:
    """A drawing at its own size, softened as by a lens."""
    return picture.filter(ImageFilter.GaussianBlur(blur)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def ball(picture: Image.Image, centre: tuple[int, int], radius: int, dark: Colour, light: Colour) -> None:
    """A ball lit from the upper left."""
    draw = ImageDraw.Draw(picture)
    for step in range(48):
        share = step / 47
        r, shift = radius * (1 - share), radius * 0.4 * share
        x, y = centre[0] - shift, centre[1] - shift
        colour = tuple(round(d + share * (g - d)) for d, g in zip(dark, light, strict=True))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def orange() -> Image.Image:
    """An orange on a white table."""
    picture = gradient((250, 250, 248), (225, 222, 216))
    ImageDraw.Draw(picture).ellipse((110, 390, 440, 460), fill=(175, 165, 150))
    picture = picture.filter(ImageFilter.GaussianBlur(12))
    ball(picture, (256, 262), 172, (196, 90, 8), (255, 178, 60))
    ImageDraw.Draw(picture).ellipse((238, 98, 274, 124), fill=(70, 95, 40))
    return finish(picture)


def sea() -> Image.Image:
    """The sea under an open sky."""
    picture = gradient((105, 165, 225), (215, 232, 245))
    picture.paste(gradient((30, 85, 130), (70, 140, 165)).crop((0, 0, 512, 256)), (0, 270))
    draw, random = ImageDraw.Draw(picture), np.random.default_rng(1)
    for _ in range(160):
        y = int(random.uniform(280, 505))
        x, length = int(random.uniform(-30, 512)), int(8 + (y - 270) * 0.25)
        draw.line((x, y, x + length, y), fill=(150, 195, 215), width=1 + (y - 270) // 90)
    return finish(picture)


def mountain() -> Image.Image:
    """Two peaks with snow above dark woods."""
    picture = gradient((95, 150, 215), (200, 220, 240))
    draw = ImageDraw.Draw(picture)
    for left, top, right, colour in ((180, 150, 620, (105, 110, 125)), (-120, 90, 420, (80, 84, 98))):
        middle = (left + right) / 2
        draw.polygon([(left, 430), (middle, top), (right, 430)], fill=colour)
        slope = (right - left) / 2 / (430 - top)
        snow = [(middle, top), (middle + 95 * slope, top + 95), (middle + 30, top + 70), (middle, top + 115)]
        draw.polygon([*snow, (middle - 35, top + 65), (middle - 95 * slope, top + 95)], fill=(238, 242, 247))
    draw.rectangle((0, 400, 512, 512), fill=(45, 75, 45))
    for x in range(-10, 520, 26):
        draw.polygon([(x, 420), (x + 16, 352 + 24 * math.sin(x)), (x + 32, 420)], fill=(38, 66, 42))
    return finish(picture)


def mushroom() -> Image.Image:
    """A brown mushroom on a meadow."""
    picture = gradient((110, 140, 80), (60, 90, 45), noise=14)
    draw = ImageDraw.Draw(picture)
    draw.polygon([(216, 250), (296, 250), (318, 450), (194, 450)], fill=(228, 214, 188))
    draw.ellipse((192, 425, 320, 470), fill=(228, 214, 188))
    draw.pieslice((90, 90, 422, 430), 180, 360, fill=(158, 92, 48))
    draw.ellipse((90, 222, 422, 298), fill=(206, 178, 140))
    draw.pieslice((120, 105, 330, 330), 195, 290, fill=(186, 118, 68))
    return finish(picture, 5)


def rocket() -> Image.Image:
    """A white rocket that takes off."""
    picture = gradient((45, 90, 165), (150, 185, 225))
    draw, random = ImageDraw.Draw(picture), np.random.default_rng(2)
    for _ in range(70):
        x, y, r = random.normal(256, 60), random.uniform(410, 520), random.uniform(14, 46)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(225, 222, 218))
    draw.polygon([(226, 380), (286, 380), (256, 500)], fill=(255, 190, 60))
    draw.polygon([(214, 290), (170, 385), (214, 365)], fill=(170, 40, 40))
    draw.polygon([(298, 290), (342, 385), (298, 365)], fill=(170, 40, 40))
    draw.rectangle((214, 130, 298, 380), fill=(235, 236, 240))
    draw.rectangle((270, 130, 298, 380), fill=(200, 203, 210))
    draw.polygon([(214, 130), (256, 40), (298, 130)], fill=(170, 40, 40))
    return finish(picture)


def cloud() -> Image.Image:
    """A white cloud in a blue sky."""
    picture = gradient((60, 120, 205), (150, 195, 235))
    shade, light = (205, 212, 222), (248, 250, 252)
    puffs = [(150, 300, 78), (235, 240, 96), (335, 262, 88), (400, 315, 62), (265, 318, 84)]
    draw = ImageDraw.Draw(picture)
    for colour, shift in ((shade, 16), (light, 0)):
        for x, y, r in puffs:
            draw.ellipse((x - r, y - r + shift, x + r, y + r * 0.8 + shift), fill=colour)
    return finish(picture, 12)
