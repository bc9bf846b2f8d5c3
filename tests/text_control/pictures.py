"""Draw the pictures of the text control's help pages and workflows: what the networks are shown. No model is needed.

python dev.py draw text_control
"""

from __future__ import annotations

import numpy as np
import torch
from graphs.titles import thumbnail_of
from make_pictures import ROOT, panels, save
from PIL import Image
from text_control.graph import PHOTO, SIGN, STYLED, TEACH

PHOTOS, DOCS = ROOT / "workflows" / "pictures", ROOT / "web" / "docs"
SIDE = 384
INK_BOX = {"x": 40, "y": 28, "width": 210, "height": 84}


def image_of(tensor: torch.Tensor) -> Image.Image:
    """(H, W, 3) or (1, H, W) of 0..1 as a picture."""
    array = (tensor.clamp(0, 1) * 255).round().byte().squeeze().numpy()
    return Image.fromarray(array).convert("RGB")


def square(picture: Image.Image) -> Image.Image:
    """The whole of it on a square."""
    side = max(picture.size)
    sheet = Image.new("RGB", (side, side), "white")
    sheet.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def photo() -> torch.Tensor:
    """The coffee photo (1, H, W, 3)."""
    opened = Image.open(PHOTOS / "palimpsest_coffee.webp").convert("RGB")
    return torch.from_numpy(np.array(opened)).float()[None] / 255


def written(text: str, image: torch.Tensor | None = None, **more):
    """(lines, preview (H, W, 3)) of Text Lines."""
    from palimpsest.nodes.exact_text.nodes import TextLinesNode

    lines, _, _, preview, *_ = TextLinesNode.execute(image=image, lines=text, **more).args
    return lines, preview[0]


def draw_hint() -> None:
    from palimpsest.kernels.text_control import blanked

    image = photo()
    lines, preview = written("TEA", image, bboxes=[[{"x": 16, "y": 290, "width": 170, "height": 76}]])
    blank = blanked(image.movedim(-1, 1), lines.positions[None]).movedim(1, -1)[0]
    shown = [
        (square(image_of(preview)), "the lines you ask for"),
        (square(image_of(blank)), "the photo without its text"),
    ]
    shown += [
        (square(image_of(lines.glyphs)), "letters, at twice its size"),
        (square(image_of(lines.positions)), "their place"),
    ]
    save(panels(shown), DOCS / "PalimpsestApplyTextControl" / "hint.jpg")
    save(square(image_of(preview)), thumbnail_of(PHOTO))


def draw_reader() -> None:
    from palimpsest.kernels.text_recognition import best_path, prepared
    from palimpsest.nodes.exact_text import shipped_recogniser
    from palimpsest.nodes.exact_text.recogniser import alphabet

    sheet = []
    for text in ("OPEN", "Exact Text 42"):
        lines, _ = written(text)
        with torch.no_grad():
            read = best_path(shipped_recogniser()(prepared(lines.strips[:1])[None])[0], alphabet())
        strip = Image.new("RGB", (SIDE, SIDE // 2), "white")
        strip.paste(image_of(lines.strips[:1]).resize((SIDE, SIDE * 80 // 512)), (0, SIDE // 6))
        sheet.append((strip, f'read as "{read.text}"'))
    save(panels(sheet), DOCS / "PalimpsestLoadAnyText" / "reader.jpg")


def draw_lesson() -> None:
    from palimpsest.nodes import exact_text
    from palimpsest.nodes.exact_text.drawing import outlined

    lines, preview = written("OPEN\nALL NIGHT", width=512, height=512)
    found = exact_text.lines_at(
        [line.text for line in lines.lines], [line.polygon for line in lines.lines], (512, 512), exact_text.BUILT_IN
    )
    picture = outlined(preview, lines.lines, [line.text for line in lines.lines])
    between = torch.ones(24, 512)
    strips = torch.cat([found.strips[0], between, found.strips[1]], 0)
    shown = [
        (image_of(picture), "a picture, its lines written down"),
        (image_of(found.glyphs), "letters in their polygons"),
    ]
    shown += [(image_of(found.positions), "the polygons"), (square(image_of(strips)), "each line for the recogniser")]
    save(panels(shown), DOCS / "PalimpsestTrainTextControl" / "lesson.jpg")
    save(square(panels(shown)), thumbnail_of(TEACH))
    save(image_of(preview).resize((SIDE, SIDE), Image.Resampling.LANCZOS), thumbnail_of(SIGN))


def draw_styled() -> None:
    """A line over a picture in ink: what is asked for."""
    from lora_training import ink
    from pocket import world

    drawn = ink.in_ink(world.render(ink.scenes(3)[2], SIDE))
    _, preview = written("OPEN", torch.from_numpy(drawn).float()[None] / 255, bboxes=[[INK_BOX]])
    save(image_of(preview), thumbnail_of(STYLED))


def main() -> None:
    """Write web/docs/Palimpsest{LoadAnyText,ApplyTextControl,TrainTextControl}/*.jpg and the thumbnails."""
    draw_hint()
    draw_reader()
    draw_lesson()
    draw_styled()
