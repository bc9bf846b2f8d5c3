"""Draw what the registry shows of the pack: docs/icon.png (400 x 400) and docs/banner.png (21 : 9).

    python dev.py make logo

A palimpsest is a page that was written over and still shows its first text: the source shows through the edit.
"""

from __future__ import annotations

import numpy as np
from make_pictures import ROOT, example_scene
from PIL import Image, ImageDraw, ImageFont
from pocket import world

ICON, BANNER = 400, (1260, 540)
PAPER, INK, FADED = (246, 239, 224), (52, 44, 40), (226, 214, 190)
TITLE, SAID = "Palimpsest", ("Edit real pictures.", "The original shows through", "wherever it is not asked to change.")
BEHIND = "once written, scraped off, written over; once seen, never gone; "
SHOWS_THROUGH = 0.32  # share of the source in the picture
PART = (0.2, 0.2, 0.96, 0.96)  # of the scene: the animal and what is behind it


def page(side: int) -> Image.Image:
    """The edited picture through which its source shows."""
    scene, whole = example_scene(), round(side / (PART[2] - PART[0]))
    source, edit = (world.render(each, whole).astype(float) for each in (scene, world.edit(scene, pose="sitting")))
    drawn = Image.fromarray((SHOWS_THROUGH * source + (1 - SHOWS_THROUGH) * edit).astype(np.uint8))
    left, top = round(PART[0] * whole), round(PART[1] * whole)
    return drawn.crop((left, top, left + side, top + side))


def icon() -> Image.Image:
    """The page with round corners."""
    mask = Image.new("L", (4 * ICON, 4 * ICON), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * ICON - 1, 4 * ICON - 1), radius=ICON // 2, fill=255)
    made = page(ICON).convert("RGBA")
    made.putalpha(mask.resize((ICON, ICON), Image.Resampling.LANCZOS))
    return made


def banner() -> Image.Image:
    """The name over faded writing, the page beside it."""
    made = Image.new("RGB", BANNER, PAPER)
    draw, faded = ImageDraw.Draw(made), ImageFont.load_default(34)
    for line in range(BANNER[1] // 54 + 1):
        draw.text((-300 + line % 3 * 130, 54 * line - 6), BEHIND * 2, fill=FADED, font=faded)
    draw.text((60, 165), TITLE, fill=INK, font=ImageFont.load_default(124), anchor="lm")
    for line, text in enumerate(SAID):
        draw.text((66, 285 + 54 * line), text, fill=INK, font=ImageFont.load_default(37), anchor="lm")
    shown = page(BANNER[1] - 80)
    made.paste(shown, (BANNER[0] - shown.width - 40, 40))
    return made.quantize(256, Image.Quantize.MEDIANCUT)


def main() -> None:
    """Write docs/icon.png and docs/banner.png."""
    for name, picture in (("icon", icon()), ("banner", banner())):
        path = ROOT / "docs" / f"{name}.png"
        picture.save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.1f} kB")
