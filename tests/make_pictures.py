"""Draw the tests' input and the pictures of the help pages; make_thumbnails.py has the workflows'.

    python dev.py make examples         tests/data/input/*
    python dev.py make demo             from the demo's pictures: web/docs/<NodeId>/*.jpg
    python dev.py draw kv               the same, of settings side by side

The demo's folder holds source.png, ddim.png (sampled from the inverted noise with the source's prompt, nothing
learned), tuned.png (the same with the tuned keys and values), prompt_swap_action.png (edit prompt, nothing learned),
kv_action.png (edit prompt with Apply KV) and, where it is known, ideal_action.png. `knobs` runs the nodes here, on the
pocket model in its narrow form: some minutes on two cores; it needs the environment and the host that dev.py has set
up.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from pocket import world

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLE = TESTS / "data" / "input" / "palimpsest_example.png"
SECOND_EXAMPLE = EXAMPLE.with_stem("palimpsest_example_2")
MASKED_EXAMPLE = EXAMPLE.with_stem("palimpsest_example_masked")
PLACE_EXAMPLE = EXAMPLE.with_stem("palimpsest_example_place")
POSE_EXAMPLE = EXAMPLE.with_stem("palimpsest_example_pose")
WALK = EXAMPLE.with_name("palimpsest_walk.webp")
SHORT_WALK, SHORT_FRAMES = WALK.with_stem("palimpsest_walk_short"), 3  # own, first and previous frame are three
EXAMPLE_SEED = (world.HELD_OUT_SEED, 138)
EXAMPLE_CAPTION = "a red cat standing on the right in the snow"
EXAMPLE_EDIT = {"pose": "sitting"}
SECOND = {
    "species": "dog", "colour": "brown", "side": "left", "tint": (0.0, 0.0, 0.0), "pattern": "patch", "second": 0,
    "collar": 4, "socks": True, "tailtip": True,
}  # fmt: skip
SHOWN_POSE = {"pose": "running"}
STRIP = 44  # pixels of the example picture's edge that show its place
STEPS, GUIDANCE = 20, 3.0
POSES = ("sitting", "lying", "running", "jumping")

CELL = 256  # pixels of one picture on a help page
THUMBNAIL = 512
LABEL = 30  # height of a line of text under a picture
LETTERS = 23  # height of the letters
GAP = 8
QUALITY = 80
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
        {
            "source": "your picture",
            "prompt_swap_action": "new prompt alone",
            "kv_action": "with Apply KV",
            "ideal_action": "ideal answer",
        },
    ),
    "PalimpsestSaveKV": ("save", {"source": "your picture", "tuned": "what the file gives back"}),
    "PalimpsestLoadKV": ("load", {"tuned": "what the file gives back", "kv_action": "edited from the file"}),
}


def example_scene() -> world.Scene:
    """The scene of the example picture. Raises ValueError when a change of the world has turned it into another."""
    scene = world.sample_scene(np.random.default_rng(list(EXAMPLE_SEED)))
    if world.caption(scene) != EXAMPLE_CAPTION:
        raise ValueError(f"the scene of seed {EXAMPLE_SEED} is now {world.caption(scene)!r}: choose another seed")
    return scene


def second_scene() -> world.Scene:
    """The scene of the second example picture: another animal, on the other side of the same place."""
    return world.edit(example_scene(), **SECOND)


def walk_scene() -> world.Scene:
    """The scene of the example clip: the second animal, in another place."""
    return world.edit(second_scene(), place="park")


def draw_walks() -> list[Path]:
    """A walk cycle of 8 frames, exact to the pixel, as an animated picture; its first frames as another."""
    from benchmarks import walks

    frames = [Image.fromarray(walks.render(*frame)[0]) for frame in walks.frames(walk_scene(), 8)]
    for path, shown in ((WALK, frames), (SHORT_WALK, frames[:SHORT_FRAMES])):
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=125, loop=0, lossless=True)
    return [WALK, SHORT_WALK]


def draw_examples() -> list[Path]:
    from pose_control import skeleton

    EXAMPLE.parent.mkdir(parents=True, exist_ok=True)
    for path, scene in ((EXAMPLE, example_scene()), (SECOND_EXAMPLE, second_scene())):
        Image.fromarray(world.render(scene)).save(path)
    picture, mask = world.render(example_scene(), with_mask=True)
    save_masked(picture, mask > 0, MASKED_EXAMPLE)
    place = world.render(walk_scene())
    save_masked(place, np.indices(place.shape[:2])[1] >= place.shape[1] - STRIP, PLACE_EXAMPLE)
    Image.fromarray(skeleton.draw(world.edit(example_scene(), **SHOWN_POSE))).save(POSE_EXAMPLE)
    return [EXAMPLE, SECOND_EXAMPLE, MASKED_EXAMPLE, PLACE_EXAMPLE, POSE_EXAMPLE, *draw_walks()]


def save_masked(picture: np.ndarray, mask: np.ndarray, path: Path) -> None:
    """A picture with a mask painted on it, as the mask editor saves it."""
    Image.fromarray(np.dstack([picture, 255 - 255 * mask.astype(np.uint8)])).save(path)


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """A square picture to `side`; twice the size by doubled pixels, which stay crisp, any other smoothly."""
    twice = picture.size == (side // 2, side // 2)
    return picture.resize((side, side), Image.Resampling.NEAREST if twice else Image.Resampling.LANCZOS)


def panels(pictures: list[tuple[Image.Image, str]], columns: int = 2) -> Image.Image:
    """Pictures in rows of `columns`, each with its text under it.

    The help panel is about 300 pixels wide: two pictures a row and letters of this size can be read there.
    """
    font = ImageFont.load_default(LETTERS)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    texts = [[wrapped(text, font, CELL) for _, text in cells] for cells in rows]
    heights = [CELL + LABEL * max(map(len, lines)) + GAP for lines in texts]
    sheet = Image.new("RGB", (min(columns, len(pictures)) * (CELL + GAP) - GAP, sum(heights) - GAP), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for cells, lines, height in zip(rows, texts, heights, strict=True):
        for i, ((picture, _), parts) in enumerate(zip(cells, lines, strict=True)):
            left = i * (CELL + GAP)
            sheet.paste(enlarged(picture, CELL), (left, top))
            for n, part in enumerate(parts):
                place = (left + CELL / 2, top + CELL + LABEL * (n + 0.5))
                draw.text(place, part, fill=(30, 30, 30), font=font, anchor="mm")
        top += height
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in lines that are not wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        lines[-1:] = [longer] if font.getlength(longer) <= width else [*lines[-1:], word]
    return lines


def strip(sheet: Image.Image) -> Image.Image:
    """What is drawn on a white sheet, across a white thumbnail."""
    drawn = sheet.crop(ImageChops.difference(sheet, Image.new("RGB", sheet.size, "white")).getbbox())
    fitted = ImageOps.contain(drawn, (THUMBNAIL - 2 * GAP, THUMBNAIL - 2 * GAP))
    made = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    made.paste(fitted, ((THUMBNAIL - fitted.width) // 2, (THUMBNAIL - fitted.height) // 2))
    return made


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
    """Every help page's picture from the demo's results."""
    found = {path.stem: Image.open(path).convert("RGB") for path in sorted(demo.glob("*.png"))}
    wanted = {name for _, cells in PAGES.values() for name in cells} - {"ideal_action"}
    if missing := sorted(wanted - found.keys()):
        raise FileNotFoundError(
            f"{demo} has no {', '.join(missing)} (.png): run `python dev.py demo --inner-steps 10` first"
        )
    written = []
    for node, (name, cells) in PAGES.items():
        pictures = [(found[key], text) for key, text in cells.items() if key in found]
        written.append(save(panels(pictures), ROOT / "web" / "docs" / node / f"{name}.jpg"))
    return written


# -------------------------------------------------------------------------------- settings side by side, run right here


class Studio:
    """The nodes on the pocket model in this process, at their defaults except what is given."""

    def __init__(self) -> None:
        import torch
        from benchmarks import pocket_host, scenes
        from palimpsest.nodes.inversion.nodes import Invert
        from palimpsest.nodes.kv import nodes as kv_inversion

        import nodes as host_nodes

        self.torch, self.host, self.invert_node, self.defaults = torch, host_nodes, Invert, scenes.defaults
        self.kv_nodes = kv_inversion
        self.model, self.clip, self.vae = pocket_host.load_pocket(narrow=True)
        self.nothing = self.prompt("")

    def prompt(self, text: str) -> list:
        return self.host.CLIPTextEncode().encode(self.clip, text)[0]

    def invert(self, scene: world.Scene) -> tuple:
        """(trajectory, start noise) of a scene."""
        picture = self.torch.from_numpy(world.render(scene)).float()[None] / 255
        chosen = self.defaults(self.invert_node) | {"steps": STEPS, "reconstruction_guidance": 0.0}
        latent, positive = {"samples": self.vae.encode(picture)}, self.prompt(world.caption(scene))
        return self.invert_node.execute(self.model, latent, positive, **chosen).args[:2]

    def tune(self, scene: world.Scene, trajectory, **settings):
        node = self.kv_nodes.TuneKV
        chosen = self.defaults(node) | {"guidance": GUIDANCE} | settings
        positive = self.prompt(world.caption(scene))
        return node.execute(self.model, trajectory, positive, negative=self.nothing, **chosen).args[0]

    def apply(self, kv, model=None, **settings):
        node = self.kv_nodes.ApplyKV
        return node.execute(model or self.model, kv, **self.defaults(node) | settings).args[0]

    def draw(self, model, positive: str | list, noise: dict) -> Image.Image:
        """What KSampler Advanced draws from inverted noise."""
        positive = self.prompt(positive) if isinstance(positive, str) else positive
        (latent,) = self.host.KSamplerAdvanced().sample(
            model, "disable", 0, STEPS, GUIDANCE, "euler", "normal", positive, self.nothing, noise, 0, 10000, "disable"
        )
        pixels = self.vae.decode(latent["samples"])[0].clamp(0, 1)
        return Image.fromarray((pixels * 255).round().byte().numpy())

    def masked(self, prompt: str, mask) -> list:
        return self.host.ConditioningSetMask().append(self.prompt(prompt), mask, "default", 1.0)[0]

    def animal(self, scene: world.Scene, grown: int = 0):
        """A MASK of the scene's animal, grown by some pixels."""
        mask = self.torch.from_numpy(world.render(scene, with_mask=True)[1])[None]
        return self.torch.nn.functional.max_pool2d(mask[None], 2 * grown + 1, 1, grown)[0]


def draw_knobs() -> list[Path]:
    """Rows of pictures that differ in one setting."""
    studio, scene = Studio(), example_scene()
    with studio.torch.inference_mode():
        source = Image.fromarray(world.render(scene))
        trajectory, noise = studio.invert(scene)
        kv = studio.tune(scene, trajectory)
        edited = {pose: world.edit(scene, pose=pose) for pose in POSES}
        prompts = {pose: world.caption(target) for pose, target in edited.items()}
        poses = {pose: studio.draw(studio.apply(kv), prompt, noise) for pose, prompt in prompts.items()}

        def edit(kv=kv, prompt=prompts["sitting"], **settings) -> Image.Image:
            return studio.draw(studio.apply(kv, **settings), prompt, noise)

        alone = studio.draw(studio.model, prompts["sitting"], noise)
        park = world.edit(edited["sitting"], place="park")
        in_park, mask = world.caption(park), studio.animal(park, 12)
        ranks = [(rank, studio.tune(scene, trajectory, rank=rank)) for rank in (8, 4)]
        rows = {
            "PalimpsestTuneKV/rank": [
                (source, "your picture"),
                *((edit(each), f"rank {rank}, {each.bytes / 1e6:.1f} MB") for rank, each in [(0, kv), *ranks]),
            ],
            "PalimpsestApplyKV/modes": [
                (alone, "new prompt alone"),
                (poses["sitting"], "extend"),
                (edit(mode="recompute", source_guidance=1.0), "recompute"),
                (edit(mode="frozen", source_guidance=1.0), "frozen"),
            ],
            "PalimpsestApplyKV/strength": [
                (alone, "strength 0"),
                *((edit(strength=value), f"strength {value:g}") for value in (0.05, 0.2)),
                (poses["sitting"], "strength 1"),
            ],
            "PalimpsestApplyKV/source_guidance": [
                *((edit(source_guidance=value), f"source_guidance {value:g}") for value in (1.0, 4.0)),
                (poses["sitting"], "source_guidance 10"),
                (edit(source_guidance=30.0), "source_guidance 30"),
            ],
            "PalimpsestApplyKV/masks": [
                (edit(prompt=in_park), "in the park, no mask"),
                (edit(prompt=in_park, mask=mask), "mask around the cat"),
                (edit(prompt=in_park, source_mask=studio.animal(scene)), "source_mask on the cat"),
                (edit(prompt=in_park, mask=mask, source_mask=studio.animal(scene)), "both"),
            ],
            "PalimpsestPromptLines/prompts": [(picture, pose) for pose, picture in poses.items()],
        }
        left, both = draw_two(studio, kv, noise)
    written = [save(panels(cells), ROOT / "web" / "docs" / f"{name}.jpg") for name, cells in rows.items()]
    written.append(save(three(left, source, both), ROOT / "web" / "docs" / "PalimpsestApplyKV" / "two.jpg"))
    return written


def draw_two(studio: Studio, kv, noise: dict) -> tuple[Image.Image, Image.Image]:
    """(the second example picture, it and the first in one picture), as the workflow of two subjects does."""
    scene, torch = second_scene(), studio.torch
    picture = Image.fromarray(world.render(scene))
    trajectory, left_noise = studio.invert(scene)
    left = torch.cat([torch.ones(1, 128, 128), torch.zeros(1, 128, 128)], -1)
    prompts = [
        world.caption(world.edit(scene, pose="sitting")),
        world.caption(world.edit(example_scene(), pose="lying")),
    ]
    positive = [
        each for prompt, mask in zip(prompts, (left, 1 - left), strict=True) for each in studio.masked(prompt, mask)
    ]
    model = studio.apply(studio.tune(scene, trajectory), mask=left)
    model = studio.apply(kv, model, mask=1 - left)
    return picture, studio.draw(model, positive, {"samples": torch.cat([left_noise["samples"], noise["samples"]], -1)})


def grid(pictures: list[Image.Image]) -> Image.Image:
    """Four square pictures, two by two, at a thumbnail's size."""
    side = pictures[0].width
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 2 * side, i // 2 * side))
    return enlarged(sheet, THUMBNAIL)


def three(left: Image.Image, right: Image.Image, wide: Image.Image) -> Image.Image:
    """Two square pictures over one of twice their width."""
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    for i, picture in enumerate((left, right)):
        sheet.paste(enlarged(picture, THUMBNAIL // 2), (i * THUMBNAIL // 2, 0))
    sheet.paste(wide.resize((THUMBNAIL, THUMBNAIL // 2), Image.Resampling.NEAREST), (0, THUMBNAIL // 2))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("example")
    commands.add_parser("knobs")
    docs = commands.add_parser("docs")
    docs.add_argument("--demo", type=Path, default=ROOT / "output" / "demo")
    options = parser.parse_args()
    draw = {
        "example": draw_examples,
        "knobs": draw_knobs,
        "docs": lambda: draw_docs(options.demo),
    }
    for path in draw[options.command]():
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.1f} kB")
