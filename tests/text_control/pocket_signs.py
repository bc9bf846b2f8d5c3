"""Boards of the drawn world as a text control learns them: their lines, latents and maps, drawn beforehand.

Letters have 24 to 32 pixels, the sizes that the pocket's autoencoder carries. Trainings see no text with one of the
pairs of letters that signs.is_held_out names; what is measured has one in every text.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from pocket import autoencoder, signs, train, world
from torch import Tensor

PART = 128  # pictures in one file
TRAINING_SEED, HELD_OUT_SEED = 8301, 8302
SMALLEST = 24 * signs.PIXEL
SIDE, CELLS = 128, 16
HIGH, WIDE = 1.25, 1 / 0.83  # of a line's place, in ems and in widths of its letters: then Text Lines writes their size
MAPS = 320  # channels of glyphs and positions, packed
NECK = (40, 64)


def pack() -> ModuleType:
    """The pack, also in a process that was started for this."""
    import prepared

    found = prepared.load_pack()
    train.import_host()
    return found


def register_fonts() -> None:
    """Let Text Lines choose from the fonts of the signs."""
    import folder_paths
    from palimpsest.nodes.exact_text import fonts

    folder_paths.folder_names_and_paths[fonts.FOLDER] = ([str(font_of("A").parent)], set(fonts.KINDS))
    folder_paths.filename_list_cache.pop(fonts.FOLDER, None)


def scene_of(index: int, seed: int = TRAINING_SEED, *, held_out: bool = False) -> world.Scene:
    """A scene with a sign whose letters are large enough, and free of the animal if that can be."""
    rng = np.random.default_rng([seed, index])
    scene = world.sample_scene(rng)
    mask, found = world.Animal(scene, world.Canvas(64)).mask(), []
    while len(found) < 3 and not (found and found[-1][1] == 0):
        text = signs.sample_text(rng, held_out=held_out)
        if signs.needed_width(text, SMALLEST) < signs.WIDEST:
            sign, covered = signs.clear_place(rng, [mask], text=text)
            found += [(sign, covered)] if sign.size >= SMALLEST else []
    return replace(scene, sign=min(found, key=lambda pair: pair[1])[0])


def held_out(count: int) -> list[world.Scene]:
    """Scenes that no training sees, each with another text that none sees, whose letters nothing stands before.

    A quarter of them is Chinese.
    """
    found: dict[str, world.Scene] = {}
    left = {signs.CHARACTERS: count // 4, signs.LETTERS: count - count // 4}
    for index in itertools.count():
        scene = scene_of(index, HELD_OUT_SEED, held_out=True)
        text = scene.sign.text
        if text not in found and left[signs.alphabet_of(text[0])] and hidden(scene) == 0:
            found[text] = scene
            left[signs.alphabet_of(text[0])] -= 1
        if not any(left.values()):
            return list(found.values())


def hidden(scene: world.Scene) -> float:
    """The share of the letters' row that the animal hides."""
    mask = world.Animal(scene, world.Canvas(64)).mask()
    left, top, right, bottom = (np.array(signs.row_of(scene.sign)) * 64).round().astype(int)
    return float(mask[top:bottom, left:right].mean())


def font_of(text: str) -> Path:
    """The font in which the world writes a text."""
    return signs.FONTS[signs.alphabet_of(text[0])]


def box_of(sign: signs.Sign) -> tuple[float, float, float, float]:
    """The place of a line as one would draw it around the letters: left, top, right, bottom in pixels."""
    left, top, right, bottom = (SIDE * edge for edge in signs.line_of(sign).box)
    high = HIGH * sign.size * SIDE
    wide = min((right - left) * WIDE, sign.width * SIDE)
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2


def polygon_of(sign: signs.Sign) -> Tensor:
    """That place as corners (4, 2), x and y, at whole pixels."""
    left, top, right, bottom = (round(edge) for edge in box_of(sign))
    return torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=torch.float32)


def caption_with(phrase: str, text: str) -> str:
    """A phrase of the world and what its sign says, as Text Prompt reads it."""
    return f'{phrase} with a sign that says "{text}"'


# ------------------------------------------------------------------------------------------------------ what is learned


@dataclass(frozen=True)
class Signs:
    """Pictures that are learned from. latents, masked (n, 4, 16, 16): normalised, the second without the letters; grey
    (1, 4, 16, 16); maps (n, 10240) uint8, eight cells a byte; necks (n, 40, 64); scenes.
    """

    latents: Tensor
    masked: Tensor
    grey: Tensor
    maps: Tensor
    necks: Tensor
    scenes: list[world.Scene]

    def maps_of(self, rows: Sequence[int]) -> Tensor:
        """Glyphs and positions (B, 320, 16, 16) of some."""
        bits = np.unpackbits(self.maps[torch.as_tensor(rows)].numpy(), axis=1)
        return torch.from_numpy(bits).view(len(rows), MAPS, CELLS, CELLS).float()


def load(folder: Path, mean: float, std: float) -> Signs:
    """All parts of a folder that are there."""
    parts = [np.load(path) for path in sorted(folder.glob("[0-9]*.npz"))]
    if not parts:
        raise FileNotFoundError(f"{folder} has no pictures: run the stage latents first")

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([part[name] for part in parts]))

    def normal(latents: Tensor) -> Tensor:
        return (latents.float() - mean) / std

    scenes = [world.Scene.from_dict(each) for part in parts for each in json.loads(str(part["scenes"]))]
    grey = normal(torch.from_numpy(parts[0]["grey"]))
    return Signs(
        normal(joined("latents")), normal(joined("masked")), grey, joined("maps"), joined("necks").float(), scenes
    )


def encode(folder: Path, count: int, processes: int) -> None:
    """Draw and encode pictures in parts; an interrupted run goes on, and more can be added later."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {low: folder / f"{low:06d}.npz" for low in range(0, count, PART)}
    jobs = [(part, low) for low, part in parts.items() if not part.exists()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(encode_part, jobs, chunksize=1)


def encode_part(part: Path, low: int) -> None:
    """One file of pictures."""
    torch.set_num_threads(1)
    pack()
    register_fonts()
    from palimpsest.nodes import exact_text
    from palimpsest.nodes.text_control import examples

    reader = examples.Reader(exact_text.shipped_recogniser())
    scenes = [scene_of(index) for index in range(low, low + PART)]
    lines = [lines_of(scene) for scene in scenes]
    pictures = drawn(scenes)
    blank = without_letters(pictures, torch.stack([each.positions for each in lines]))
    model = autoencoder.load(autoencoder.WEIGHTS, "cpu")
    maps = torch.cat([examples.maps_of(each) for each in lines]).flatten(1)
    with torch.no_grad():
        necks = torch.cat([reader.necks([strip[None] for strip in each.strips]) for each in lines])
        content = {
            "latents": latents_of(model, pictures), "masked": latents_of(model, blank),
            "grey": latents_of(model, torch.full((1, 3, SIDE, SIDE), 0.5)), "necks": necks.half().numpy(),
            "maps": np.packbits(maps.numpy(), axis=1), "scenes": json.dumps([asdict(scene) for scene in scenes]),
        }  # fmt: skip
    temporary = part.with_name(f"part_{part.name}")
    np.savez(temporary, **content)
    os.replace(temporary, part)
    print(f"signs {low} to {low + PART - 1} encoded", flush=True)


def lines_of(scene: world.Scene):
    """The line of a scene's sign as Text Lines makes it."""
    from palimpsest.nodes import exact_text

    sign = scene.sign
    return exact_text.lines_at([sign.text], [polygon_of(sign)], (SIDE, SIDE), font_of(sign.text).name)


def drawn(scenes: Sequence[world.Scene]) -> Tensor:
    """Pictures (n, 3, 128, 128) in 0..1."""
    return torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).movedim(-1, 1).float() / 255


def without_letters(pictures: Tensor, positions: Tensor) -> Tensor:
    """Pictures whose lines' places (n, 1, H, W) are blanked."""
    from palimpsest.kernels.text_control import blanked

    return blanked(pictures, positions)


def latents_of(model: autoencoder.Autoencoder, pictures: Tensor) -> np.ndarray:
    """float16 (n, 4, 16, 16) as the autoencoder gives them."""
    found = []
    for batch in pictures.split(8):
        with autoencoder.autocast("cpu"):
            found.append(model.encode(batch.contiguous(memory_format=torch.channels_last)).half())
    return torch.cat(found).contiguous().numpy()


def with_text(scene: world.Scene, text: str) -> world.Scene:
    """A scene whose board says another text of its size."""
    return replace(scene, sign=signs.rewrite(scene.sign, text))
