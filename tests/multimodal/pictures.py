"""Draw the pictures of the help pages of Load Multimodal Encoder and Multimodal Prompt: what the encoder is shown.

python dev.py draw multimodal
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from benchmarks import pocket_host
from graphs.titles import thumbnail_of
from make_pictures import CELL, ROOT, grid, panels, save
from multimodal import benchmark as bench
from palimpsest.nodes import plots
from palimpsest.nodes.multimodal.dataset.synthetic import PairSettings
from palimpsest.nodes.multimodal.dataset.synthetic import pairs as synthetic_pairs
from palimpsest.nodes.multimodal.interleaved import cut_out, fill, numbered, squared, with_tokens
from palimpsest.nodes.multimodal.seen import layout_picture
from PIL import Image, ImageDraw
from pocket import world

import nodes as host_nodes

SCENE, SIDE, PATCH = 5, 512, 14
SYNTHETIC, SIDE_OF_THUMBNAIL = "Synthetic pairs for a multimodal encoder (Multimodal)", 384
ANIMALS = (0, 2)  # of the held-out ones that the benchmark asks for
DETAIL = {16: "16 tokens: 56 px", 64: "64: 112 px", 324: "324: 252 px", 1296: "1296: 504 px"}


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """A drawn picture (H, W, 3) that is wider than high, and the mask (1, H, W) of its animal."""
    picture, mask = world.render(world.held_out_scenes(SCENE + 1)[SCENE], SIDE, with_mask=True)
    part = slice(SIDE // 6, SIDE)
    return torch.from_numpy(picture)[part].float() / 255, torch.from_numpy(mask)[None, part].float()


def to_image(shown: torch.Tensor) -> Image.Image:
    """What the encoder is shown, (1, 3, side, side) in -1..1, as large as a cell of the page."""
    pixels = ((shown[0].movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)


def with_grid(picture: Image.Image, tokens: int) -> Image.Image:
    """A picture under the grid of its tokens."""
    grid, draw = math.isqrt(tokens), ImageDraw.Draw(picture)
    for i in range(1, grid):
        at = round(i * CELL / grid)
        draw.line([(at, 0), (at, CELL)], fill=(255, 255, 255))
        draw.line([(0, at), (CELL, at)], fill=(255, 255, 255))
    return picture


def at(picture: torch.Tensor, tokens: int) -> Image.Image:
    """A picture as Idefics2 is shown it for so many tokens."""
    return to_image(squared(picture, math.isqrt(tokens) * PATCH))


def load() -> bench.Pocket:
    """The pocket model and its encoder."""
    with torch.inference_mode():
        return bench.load(ROOT / "tests" / "pocket" / "models", *pocket_host.load_pocket(narrow=False))


def seen(pocket: bench.Pocket) -> Image.Image:
    """A prompt of two pictures as the pocket encoder is given it, the second one weakened."""
    picture, mask = drawn()
    words, images = (
        "a <image1> cat sitting in the <image2:0.5> park",
        {"image1": picture[None], "image2": picture[None, :, :200]},
    )
    prompts = fill({"text": words, "negative_text": ""}, numbered(images, {"mask1": mask}, remove=True))
    prompts = {name: with_tokens(prompt, 64) for name, prompt in prompts.items()}
    vlm = pocket.encoder.vlm
    return plots.to_image(layout_picture(vlm, prompts, len(vlm.tokenised(prompts["text"])[0]))[0])


def animals(pocket: bench.Pocket) -> Image.Image:
    """Held-out animals in another pose, at another side and place than in their pictures, by the pocket encoder."""
    with torch.inference_mode():
        asked = bench.questions(bench.FIRST, max(ANIMALS) + 1)
        cells = []
        for question in (asked[i] for i in ANIMALS):
            shown = to_image(question.picture.movedim(-1, 1) * 2 - 1)
            cells.append((shown, "<image1>, its animal masked"))
            for tokens in (16, 64, 256):
                found = bench.draw(pocket, question, bench.ByPicture(tokens)(pocket, question))
                cells.append((to_image(found.movedim(-1, 1) * 2 - 1), f"{tokens} tokens"))
    return panels(cells)


def pairs(pocket: bench.Pocket) -> list[tuple[Image.Image, str]]:
    """Contents times styles, drawn by the pocket model, whose styles are places: pictures and their prompts."""
    chosen = PairSettings(
        "a red [cat] sitting on the right\na brown [dog] running on the left", "in the snow\nat night"
    )
    cells, (negative,) = [], host_nodes.CLIPTextEncode().encode(pocket.clip, "")
    for pair in synthetic_pairs(chosen):
        (positive,) = host_nodes.CLIPTextEncode().encode(pocket.clip, pair.prompt.replace(",", ""))
        question = SimpleNamespace(seed=pair.seed)
        found = bench.draw(pocket, question, (pocket.plain, positive, negative, 0))
        cells.append((to_image(found.movedim(-1, 1) * 2 - 1), pair.prompt))
    return cells


def main() -> None:
    """Write the pictures of Load Multimodal Encoder, Multimodal Prompt and Synthetic Prompts, and a thumbnail."""
    picture, mask = drawn()
    removed, kept = (cut_out(picture, mask, "image1", remove) for remove in (True, False))
    cells = {
        "PalimpsestMultimodalPrompt/masks": [(at(picture, 1296), "without a mask"), (at(kept, 1296), "background kept"),
                                             (at(removed, 1296), "background removed")],
        "PalimpsestMultimodalPrompt/tokens": [(at(removed, tokens), label) for tokens, label in DETAIL.items()],
        "PalimpsestLoadMultimodalEncoder/patches": [(with_grid(at(removed, tokens), tokens), f"{tokens} tokens")
                                                    for tokens in (64, 324, 1296)],
    }  # fmt: skip
    for name, pictures in cells.items():
        path = ROOT / "web" / "docs" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        print(save(panels(pictures), path))
    pocket, folder = load(), ROOT / "web" / "docs" / "PalimpsestMultimodalPrompt"
    print(save(seen(pocket), folder / "seen.jpg"))
    print(save(animals(pocket), folder / "animals.jpg"))
    with torch.inference_mode():
        drawn_pairs = pairs(pocket)
    print(save(panels(drawn_pairs), ROOT / "web" / "docs" / "PalimpsestSyntheticPrompts" / "pairs.jpg"))
    thumbnail = grid([picture for picture, _ in drawn_pairs]).resize((SIDE_OF_THUMBNAIL,) * 2, Image.Resampling.LANCZOS)
    print(save(thumbnail, thumbnail_of(SYNTHETIC)))
