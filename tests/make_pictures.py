"""Draw the pictures that the pack ships: the example input, the help pages' pictures, the workflows' thumbnails.

    python tests/make_pictures.py example                       tests/data/input/palimpsest_example.png
    python tests/make_pictures.py docs --demo output/demo       web/docs/<NodeId>/*.jpg and workflows/*.jpg

The demo's folder holds source.png, ddim.png (sampled from the inverted noise with the source's prompt, nothing
learned), tuned.png (the same with the tuned keys and values), prompt_swap.png (edit prompt, nothing learned), kv.png
(edit prompt with Apply KV) and, where it is known, ideal.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pocket import world

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLE = TESTS / "data" / "input" / "palimpsest_example.png"
EXAMPLE_SEED = (world.HELD_OUT_SEED, 138)
EXAMPLE_CAPTION = "a red cat standing on the right in the snow"
EXAMPLE_EDIT = {"pose": "sitting"}

CELL = 256  # pixels of one picture on a help page
THUMBNAIL = 512
LABEL = 26  # height of the line of text under a picture
GAP = 8
QUALITY = 88
LARGEST = 60_000  # bytes

# Help page: its picture's name, and the demo's pictures in it with what stands under each.
PAGES = {
    "PalimpsestInvert": ("inversion", {"source": "your picture", "ddim": "redrawn from its noise"}),
    "PalimpsestTuneKV": (
        "tuning",
        {"source": "your picture", "ddim": "redrawn, nothing learned", "tuned": "redrawn after Tune KV"},
    ),
    "PalimpsestApplyKV": (
        "edit",
        {"source": "your picture", "prompt_swap": "new prompt alone", "kv": "with Apply KV", "ideal": "ideal answer"},
    ),
    "PalimpsestSaveKV": ("save", {"source": "your picture", "tuned": "what the file gives back"}),
    "PalimpsestLoadKV": ("load", {"tuned": "what the file gives back", "kv": "edited from the file"}),
}
# Workflow: the demo's picture that fills its thumbnail; the source lies small in a corner.
THUMBNAILS = {
    "Edit an action in a photo (KV Inversion)": "kv",
    "Edit again from a saved tuning (KV Inversion)": "kv",
}


def example_scene() -> world.Scene:
    """The scene of the example picture. Raises ValueError when a change of the world has turned it into another."""
    scene = world.sample_scene(np.random.default_rng(list(EXAMPLE_SEED)))
    if world.caption(scene) != EXAMPLE_CAPTION:
        raise ValueError(f"the scene of seed {EXAMPLE_SEED} is now {world.caption(scene)!r}: choose another seed")
    return scene


def draw_example() -> Path:
    EXAMPLE.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(world.render(example_scene())).save(EXAMPLE)
    return EXAMPLE


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """A square picture to `side`; twice the size by doubled pixels, which stay crisp, any other smoothly."""
    twice = picture.size == (side // 2, side // 2)
    return picture.resize((side, side), Image.Resampling.NEAREST if twice else Image.Resampling.LANCZOS)


def row(pictures: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures side by side, each with a line of text under it."""
    sheet = Image.new("RGB", (len(pictures) * (CELL + GAP) - GAP, CELL + LABEL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (picture, text) in enumerate(pictures):
        left = i * (CELL + GAP)
        sheet.paste(enlarged(picture, CELL), (left, 0))
        draw.text((left + CELL / 2, CELL + LABEL / 2), text, fill=(30, 30, 30), font=font, anchor="mm")
    return sheet


def thumbnail(edited: Image.Image, source: Image.Image) -> Image.Image:
    """The edited picture with the source small in the upper left corner."""
    sheet = enlarged(edited, THUMBNAIL)
    inset = enlarged(source, THUMBNAIL // 3)
    frame = Image.new("RGB", (inset.width + 8, inset.height + 8), "white")
    frame.paste(inset, (4, 4))
    sheet.paste(frame, (14, 14))
    return sheet


def save(picture: Image.Image, path: Path) -> Path:
    """Write a JPEG of at most LARGEST bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(QUALITY, 20, -6):
        picture.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= LARGEST:
            return path
    raise ValueError(f"{path.name} cannot be saved in {LARGEST} bytes")


def draw_docs(demo: Path) -> list[Path]:
    """Every help page's picture and every workflow's thumbnail from the demo's results."""
    found = {path.stem: Image.open(path).convert("RGB") for path in sorted(demo.glob("*.png"))}
    wanted = {name for _, cells in PAGES.values() for name in cells} - {"ideal"}
    if missing := sorted(wanted - found.keys()):
        raise FileNotFoundError(f"{demo} has no {', '.join(missing)} (.png): run `python dev.py demo` first")
    written = []
    for node, (name, cells) in PAGES.items():
        pictures = [(found[key], text) for key, text in cells.items() if key in found]
        written.append(save(row(pictures), ROOT / "web" / "docs" / node / f"{name}.jpg"))
    for name, key in THUMBNAILS.items():
        written.append(save(thumbnail(found[key], found["source"]), ROOT / "workflows" / f"{name}.jpg"))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("example")
    docs = commands.add_parser("docs")
    docs.add_argument("--demo", type=Path, default=ROOT / "output" / "demo")
    options = parser.parse_args()
    written = [draw_example()] if options.command == "example" else draw_docs(options.demo)
    for path in written:
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
