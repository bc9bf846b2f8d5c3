"""How well Read Text reads what Text Lines drew: random lines in random boxes of a photo, no model in between.

    python dev.py bench exact_text [--lines 120]

Each line is read in its whole place, and around its letters with several margins, shares of the letters' height. The
built-in font has all letters, DejaVu Sans Bold the capitals.
"""

from __future__ import annotations

import argparse
import random
import shutil
import string
import tempfile
from pathlib import Path

import folder_paths
import tiny_models
import torch
from exact_text.pictures import SIDE, photo
from palimpsest.nodes.exact_text import drawing, fonts, reading
from palimpsest.nodes.exact_text.nodes import TextLinesNode
from palimpsest.nodes.extension import register_folders

BOLD = Path(__file__).resolve().parents[1] / "pocket" / "fonts" / "dejavu_sans_bold.ttf"
MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0)
LENGTHS = (4, 6, 9, 13)


def drawn(rng: random.Random, picture: torch.Tensor):
    """A random line in a random box: its text, its font, its line and the picture with it."""
    capitals = rng.random() < 0.5
    text = "".join(rng.choices(string.ascii_uppercase if capitals else string.ascii_letters, k=rng.choice(LENGTHS)))
    font = BOLD.name if capitals and rng.random() < 0.5 else fonts.BUILT_IN
    wide, high = rng.randint(160, 480), rng.randint(40, 200)
    box = {"x": rng.randint(0, SIDE - wide), "y": rng.randint(0, SIDE - high), "width": wide, "height": high}
    chosen = {"lines": text, "font": font, "bboxes": box, "spacing": rng.choice([0.0, 1.0])}
    made = tiny_models.execute(TextLinesNode, image=picture, **chosen)[0]
    return text, made, drawing.preview(picture, made.glyphs, [])[0]


def read(picture: torch.Tensor, made, text: str, margin: float | None) -> reading.Read:
    """What is read of a line in its whole place (None), or around its letters."""
    line = made.lines[0] if margin is None else reading.around_letters(made.lines[0], made.glyphs, margin)
    return reading.compared(reading.read_line(reading.crop(picture, line, 0)), text, reading.EXACTLY)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench exact_text", description=__doc__)
    parser.add_argument("--lines", type=int, default=120)
    count, picture, rng = parser.parse_args().lines, photo(), random.Random(0)
    register_folders()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        shutil.copy(BOLD, folder)
        folder_paths.folder_names_and_paths[fonts.FOLDER] = ([folder], set(fonts.KINDS))
        found: dict[float | None, list[reading.Read]] = {margin: [] for margin in (None, *MARGINS)}
        for _ in range(count):
            text, made, shown = drawn(rng, picture)
            for margin, reads in found.items():
                reads.append(read(shown, made, text, margin))
    print(f"{count} random lines of {', '.join(map(str, LENGTHS))} letters, boxes of 160-480 x 40-200 pixels")
    for margin, reads in found.items():
        figures = reading.figures([reads])
        where = "whole place" if margin is None else f"letters and {margin:g} around them"
        print(f"{where:32} exact {figures['exact']:.2f}  NED {figures['ned']:.3f}")
