"""Draw the pictures of the instruction nodes' help pages, and the thumbnail of their workflow.

python dev.py draw instruction
"""

from __future__ import annotations

from instruction.graph import TITLE, VAGUE
from make_pictures import CELL, ROOT, Studio, example_scene, panels, save, second_scene, thumbnail
from PIL import Image, ImageDraw, ImageOps
from pocket import world

PHOTO = ROOT / "workflows" / "pictures" / "palimpsest_cat.webp"
SIDE, PATCHES = 224, 16  # of CLIP ViT-L/14
OTHER, MEANT = "make it winter", {VAGUE: {"pose": "lying"}, "make it winter": {"place": "snow"}}


def whole(picture: Image.Image, colour: str = "white") -> Image.Image:
    """A picture of any shape in a square cell."""
    return ImageOps.pad(picture, (CELL, CELL), color=colour)


def square(picture: Image.Image) -> Image.Image:
    """The square in its middle."""
    return ImageOps.fit(picture, (SIDE, SIDE), Image.Resampling.BICUBIC)


def framed(picture: Image.Image) -> Image.Image:
    """A picture with a frame around the square in its middle."""
    shown = picture.copy()
    width, height = shown.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    ImageDraw.Draw(shown).rectangle((left, top, left + side - 1, top + side - 1), outline="white", width=5)
    return whole(shown)


def with_grid(picture: Image.Image) -> Image.Image:
    """A square under the grid of its patches."""
    shown = picture.resize((CELL, CELL))
    draw = ImageDraw.Draw(shown)
    for i in range(1, PATCHES):
        at = i * CELL // PATCHES
        draw.line([(at, 0), (at, CELL)], fill="white")
        draw.line([(0, at), (CELL, at)], fill="white")
    return shown


def draw_seen() -> dict[str, list]:
    """What each kind of model is shown of a photo."""
    photo = Image.open(PHOTO).convert("RGB")
    return {
        "PalimpsestExpressInstruction/seen": [
            (whole(photo), "clip: as it is"),
            (whole(photo, "black"), "multimodal encoder: padded"),
            (square(photo), "mgie: the middle"),
        ],
        "PalimpsestLoadMGIE/square": [(framed(photo), "your picture"), (with_grid(square(photo)), "256 patches")],
    }


def draw_meaning() -> tuple[list, Image.Image]:
    """(cells of instructions as they were said and as they are meant, the thumbnail), on the pocket model."""
    studio = Studio()
    cells = []
    with studio.torch.inference_mode():
        for scene, said in ((example_scene(), VAGUE), (world.edit(second_scene(), place="park"), OTHER)):
            _, noise = studio.invert(scene)
            meant = world.caption(world.edit(scene, **MEANT[said]))
            source, edited = Image.fromarray(world.render(scene)), studio.draw(studio.model, meant, noise)
            cells += [(studio.draw(studio.model, said, noise), f"prompt: {said}"), (edited, f"prompt: {meant}")]
    return cells, thumbnail(edited, source)


def main() -> None:
    """Write web/docs/Palimpsest{LoadMGIE,ExpressInstruction,EditInstruction}/*.jpg and the thumbnail."""
    cells, small = draw_meaning()
    for name, pictures in (draw_seen() | {"PalimpsestEditInstruction/meaning": cells}).items():
        print(save(panels(pictures), ROOT / "web" / "docs" / f"{name}.jpg"))
    print(save(small.resize((384, 384), Image.Resampling.LANCZOS), ROOT / "workflows" / f"{TITLE}.jpg"))
