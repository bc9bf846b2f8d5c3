"""Draw the thumbnails of the shipped workflows: run each in full with the pocket's values, and lay out what it shows.

    python dev.py make thumbnails                 workflows/*.jpg
    ... make_thumbnails --of "^0[56]" folder      some of them; every picture of the run goes into a folder, too

Each shows one thing: what its workflow makes, the source small in a corner.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable
from pathlib import Path

from graphs.titles import title_of
from make_pictures import EXAMPLE, THUMBNAIL, enlarged, grid, save, strip, three, thumbnail
from PIL import Image

SIDE = 384  # as large as a tile of the template browser needs
ROOT = Path(__file__).resolve().parent.parent


class Shown:
    """The pictures of a run, by the title of the node that shows them, and those that were loaded."""

    def __init__(self, client, prompt: dict, entry: dict):
        self.loaded = [
            Image.open(EXAMPLE.with_name(node["inputs"]["image"])).convert("RGB")
            for node in prompt.values()
            if node["class_type"] == "LoadImage"
        ]
        self.by_title: dict[str, list[Image.Image]] = {}
        for key, output in entry["outputs"].items():
            for side, names in (("", "images"), (" a", "a_images"), (" b", "b_images")):
                kind, title = prompt[key]["class_type"], prompt[key]["_meta"]["title"]
                pictures = [Image.open(io.BytesIO(client.view(**file))) for file in output.get(names, [])]
                name = f"compare{side}" if kind == "ImageCompare" else title
                if pictures:
                    self.by_title[name] = [frame for each in pictures for frame in frames(each)]

    def __getitem__(self, title: str) -> list[Image.Image]:
        return self.by_title[title]


def frames(picture: Image.Image) -> list[Image.Image]:
    """The pictures of an animated one, else the one."""
    found = []
    for number in range(getattr(picture, "n_frames", 1)):
        picture.seek(number)
        found.append(picture.convert("RGB"))
    return found


def edit(shown: Shown) -> Image.Image:
    """What was made, its source in the corner."""
    return thumbnail(shown["compare b"][0], shown["compare a"][0])


def drawn(shown: Shown) -> Image.Image:
    """What was made, from noise."""
    return enlarged(shown["The picture"][0], THUMBNAIL)


def stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures of twice their height, one over the other."""
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL))
    for i, picture in enumerate((upper, lower)):
        sheet.paste(picture.resize((THUMBNAIL, THUMBNAIL // 2), Image.Resampling.LANCZOS), (0, i * THUMBNAIL // 2))
    return sheet


def in_halves(shown: Shown) -> Image.Image:
    """Two pictures whose halves have a subject each."""
    return stacked(*shown["The picture"])


def split(left: Image.Image, right: Image.Image) -> Image.Image:
    """The left half of one picture, the right half of another."""
    sheet, other = enlarged(left, THUMBNAIL), enlarged(right, THUMBNAIL)
    sheet.paste(other.crop((THUMBNAIL // 2, 0, THUMBNAIL, THUMBNAIL)), (THUMBNAIL // 2, 0))
    sheet.paste(Image.new("RGB", (4, THUMBNAIL), "white"), (THUMBNAIL // 2 - 2, 0))
    return sheet


def with_inset(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> Image.Image:
    """A picture, framed and small, on another; (left, top) counts from the other side where it is negative."""
    frame = Image.new("RGB", (THUMBNAIL // 3 + 8,) * 2, "white")
    frame.paste(enlarged(picture, THUMBNAIL // 3), (4, 4))
    free = THUMBNAIL - frame.width
    sheet.paste(frame, tuple(place if place >= 0 else free + place for place in (left, top)))
    return sheet


def two_insets(shown: Shown) -> Image.Image:
    first, second = shown.loaded
    return with_inset(thumbnail(shown["The pictures"][0], first), second, -14, 14)


def found(shown: Shown) -> Image.Image:
    """The heat map has its words in the upper left corner."""
    return with_inset(enlarged(shown["Where the word is"][0], THUMBNAIL), shown["The mask"][0], 14, -14)


DRAWN_ELSEWHERE = {  # by the technique's pictures.py
    "Teach a style with your pictures (LoRA)",
    "Write on a photo and read it back (Text)",
    "Write on a sign (Exact Text)",
    "Change the text in a photo (Exact Text)",
    "Edit by an instruction (MGIE)",
    "Your own instruction model (Train Instruction)",
    "Edit a photo with a flow model (FlowEdit)",
    "Teach exact text with your pictures (Exact Text)",
    "Your style and exact text (Exact Text)",
    "Edit by a prompt, the layout held (ContextDiff)",
    "An action that the words do not reach (pose ControlNet)",
    "Synthetic pairs for a multimodal encoder (Multimodal)",
}
OTHERS: dict[str, Callable[[Shown], Image.Image]] = {  # by the workflow's title
    "Many prompts from one file (KV Inversion)": lambda shown: grid(
        [shown["compare a"][0], *shown["The edited pictures"][:3]]
    ),
    "Two photos in one picture (KV Inversion)": lambda shown: three(
        shown.loaded[0], shown.loaded[1], shown["Both in one picture"][0]
    ),
    "Make a mask by a word (Regions)": found,
    "Learn how much of the photo flows back (Regions)": lambda shown: thumbnail(
        shown["compare b"][0], shown["What was learned"][0]
    ),
    "Keep everything else after any edit (Regions)": lambda shown: split(shown["compare a"][0], shown["compare b"][0]),
    "Draw with a saved context adapter (Context)": lambda shown: grid(shown["With the adapter"]),
    "Edit a clip by text (Context)": lambda shown: grid(shown["The edited clip"][::2]),
    "Edit a clip by text, with context (ContextDiff)": lambda shown: grid(shown["The edited clip"][::2]),
    "Two pictures in a sentence (Multimodal)": two_insets,
    "Style from a picture (Multimodal)": lambda shown: thumbnail(shown["The pictures"][0], shown.loaded[0]),
    "Words in regions on Z-Image (Cross-Attention Mask)": drawn,
    "Words in regions on Qwen-Image (Cross-Attention Mask)": drawn,
    "A phrase for each region on FLUX (Phrase in Region)": in_halves,
    "A phrase for each region on FLUX.2 Klein (Phrase in Region)": in_halves,
    "Two characters, each in its half, on Anima (Phrase in Region)": in_halves,
    "Two phrases in a clip on Wan (Phrase in Region)": lambda shown: stacked(*shown["The clip"][:2]),
    "Train a connector on your own pictures (Multimodal)": lambda shown: strip(
        shown["Crops, what is drawn for them, and the pictures"][0]
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--of", default="", help="only workflows whose names have this (a regular expression) in them")
    options = parser.parse_args()
    import api
    from graphs.shipped import WORKFLOWS, pocket_form, provide_files
    from workshop.hosts import set_up
    from workshop.serving import open_host

    with open_host(set_up(None), "thumbnails", None) as host:
        client = api.ApiClient(host.url, timeout=600)
        chosen = [each for each in WORKFLOWS if re.search(options.of, each.stem)]
        for path in (each for each in chosen if title_of(each.stem) not in DRAWN_ELSEWHERE):
            prompt = pocket_form(path.stem)
            provide_files(client, prompt)
            shown = Shown(client, prompt, client.queue(prompt, timeout=3600))
            if options.folder:
                options.folder.mkdir(parents=True, exist_ok=True)
                for title, pictures in shown.by_title.items():
                    for number, picture in enumerate(pictures):
                        picture.save(options.folder / f"{path.stem}.{title}.{number}.png")
            drawn = OTHERS.get(title_of(path.stem), edit)(shown).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            drawn = save(drawn, path.with_suffix(".jpg"))
            print(f"{drawn.relative_to(ROOT)}  {drawn.stat().st_size / 1000:.1f} kB", flush=True)
