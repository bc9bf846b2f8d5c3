"""Draw the pictures of the instruction nodes' help pages, and the thumbnail of their workflow.

python dev.py draw instruction
"""

from __future__ import annotations

from graphs.titles import thumbnail_of
from instruction.edit_checkpoint import UNET
from instruction.graph import TITLE, VAGUE
from instruction_training.benchmark import edited
from instruction_training.pictures import edit_model
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
    """(cells of photos, of what the instruction makes of them, and of what it means; the thumbnail).

    By the pocket's instruction model from new noise, under the host's two guidances.
    """
    studio, scenes = Studio(), (example_scene(), world.edit(second_scene(), place="park"))
    sources = [world.render(scene) for scene in scenes]
    rows = [[(Image.fromarray(source), "your picture") for source in sources], [], []]
    with studio.torch.inference_mode():
        model = edit_model(studio, UNET)
        for scene, source, said in zip(scenes, sources, (VAGUE, OTHER), strict=True):
            picture = studio.torch.from_numpy(source).float()[None] / 255
            for row, text in ((rows[1], said), (rows[2], world.caption(world.edit(scene, **MEANT[said])))):
                (made,) = edited(model, studio.clip, studio.vae, picture, [text])
                row.append((Image.fromarray((made * 255).round().byte().numpy()), text))
    return [cell for row in rows for cell in row], thumbnail(rows[2][0][0], rows[0][0][0])


def main() -> None:
    """Write web/docs/Palimpsest{LoadMGIE,ExpressInstruction,EditInstruction}/*.jpg and the thumbnail."""
    cells, small = draw_meaning()
    for name, pictures in (draw_seen() | {"PalimpsestEditInstruction/meaning": cells}).items():
        print(save(panels(pictures), ROOT / "web" / "docs" / f"{name}.jpg"))
    print(save(small.resize((384, 384), Image.Resampling.LANCZOS), thumbnail_of(TITLE)))
