"""Draw the pictures of the help pages of Text Lines, Text Prompt and Read Text, and their template's.

python dev.py draw exact_text
"""

from __future__ import annotations

import math

import numpy as np
import tiny_models
import torch
import torch.nn.functional as F
from exact_text.graph import LINES, TITLE
from graphs.titles import thumbnail_of
from make_pictures import ROOT, panels, save
from palimpsest.kernels.text_recognition import prepared
from palimpsest.nodes.exact_text import shipped_recogniser
from palimpsest.nodes.exact_text.nodes import ReadText, TextLinesNode
from palimpsest.nodes.extension import register_folders
from PIL import Image

PHOTO = ROOT / "workflows" / "pictures" / "palimpsest_coffee.webp"
SIDE = 512
DOCS = ROOT / "web" / "docs"


def photo() -> torch.Tensor:
    """The middle of the coffee photo, (1, SIDE, SIDE, 3)."""
    picture = Image.open(PHOTO).convert("RGB")
    left = (picture.width - picture.height) // 2
    square = picture.crop((left, 0, left + picture.height, picture.height)).resize((SIDE, SIDE), Image.LANCZOS)
    return torch.from_numpy(np.array(square)).float()[None] / 255


def bar(middle: tuple[int, int], angle: float, length: int, breadth: int) -> torch.Tensor:
    """A MASK (1, SIDE, SIDE) of a bar around a place, turned counterclockwise by an angle in degrees."""
    y, x = torch.meshgrid(torch.arange(SIDE) - middle[1], torch.arange(SIDE) - middle[0], indexing="ij")
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return (((x * c - y * s).abs() < length / 2) & ((x * s + y * c).abs() < breadth / 2)).float()[None]


def to_image(picture: torch.Tensor) -> Image.Image:
    """(H, W) or (H, W, 3) of 0..1."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).convert("RGB")


def squared(picture: Image.Image) -> Image.Image:
    """On a black square."""
    side = max(picture.size)
    made = Image.new("RGB", (side, side))
    made.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return made


def draw_lines(mask: torch.Tensor) -> None:
    """Text Lines: a level, a slanted and an upright line."""
    made, glyphs, positions, preview, _ = tiny_models.execute(
        TextLinesNode, lines="Palimpsest\nslanted\nDOWN", image=photo(), mask=mask
    )
    cells = [
        (to_image(preview[0]), "preview: three places of a mask"),
        (to_image(glyphs[0]), "glyphs, twice as large"),
        (to_image(positions[0]), "positions"),
        (squared(to_image(made.strips.flatten(0, 1))), "each line by itself, for the reader"),
    ]
    print(save(panels(cells), DOCS / "PalimpsestTextLines" / "lines.jpg"))


def draw_prompt() -> None:
    """Text Prompt: lines, and what the recogniser knows of each."""
    cells = []
    for text in ("OPEN", "Open"):
        strip = tiny_models.execute(TextLinesNode, lines=text)[0].strips
        neck = shipped_recogniser().features(prepared(strip)[None])[0].T  # (64, 40)
        known = 0.5 + (neck - neck.mean(1, keepdim=True)) / (4 * neck.std(1, keepdim=True) + 1e-3)
        known = F.interpolate(known[None, None], (256, 512))[0, 0]
        shown = torch.cat([F.pad(strip[0], (0, 0, 60, 60)), known])
        cells.append((squared(to_image(shown)), f'"{text}" as it is drawn, and 64 numbers for each of its 40 columns'))
    print(save(panels(cells), DOCS / "PalimpsestTextPrompt" / "look.jpg"))


def draw_reading(mask: torch.Tensor) -> None:
    """Read Text: a picture as it is, blurred, and with noise."""
    made, _, _, preview, _ = tiny_models.execute(
        TextLinesNode, lines="Palimpsest\nslanted\nDOWN", image=photo(), mask=mask
    )
    small = F.interpolate(preview.movedim(-1, 1), scale_factor=1 / 8, mode="area")
    noise = torch.randn(preview.shape, generator=torch.Generator().manual_seed(0))
    kinds = {
        "as drawn": preview,
        "an eighth of the size, and back": F.interpolate(small, (SIDE, SIDE), mode="bicubic").movedim(1, -1),
        "with noise of 0.5": preview + 0.5 * noise,
        "with noise of 1": preview + noise,
    }
    cells = []
    for name, picture in kinds.items():
        found = tiny_models.execute(ReadText, image=picture.clamp(0, 1), text_lines=made)
        print(name, found[1])
        cells.append((to_image(found[6][0]), f"{name}: exact {found[2]:.0%}, NED {found[3]:.2f}"))
    print(save(panels(cells), DOCS / "PalimpsestReadText" / "read.jpg"))


def draw_thumbnail() -> None:
    """The template: the photo with its lines, read."""
    made, _, _, preview, _ = tiny_models.execute(TextLinesNode, image=photo(), lines=LINES)
    found = tiny_models.execute(ReadText, image=preview, text_lines=made)
    print(found[1])
    save(to_image(found[6][0]).resize((384, 384), Image.LANCZOS), thumbnail_of(TITLE))


def main() -> None:
    """Write web/docs/Palimpsest{TextLines,TextPrompt,ReadText}/*.jpg and the template's thumbnail."""
    register_folders()
    with torch.inference_mode():
        mask = bar((256, 70), 0, 400, 84) + bar((180, 300), 35, 330, 80) + bar((430, 310), 90, 330, 76)
        draw_lines(mask.clamp(max=1))
        draw_prompt()
        draw_reading(mask.clamp(max=1))
        draw_thumbnail()
