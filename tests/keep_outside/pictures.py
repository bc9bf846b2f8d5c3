"""Draw the pictures of the help page of Keep Outside.

python dev.py draw keep_outside
"""

from __future__ import annotations

import torch
from benchmarks.scenes import defaults
from make_pictures import ROOT, panels, save
from palimpsest.kernels.alignment import shifted_back
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from PIL import Image
from pocket import world

SCENE, COLOUR, SIDE = 5, "blue", 256
SHIFT = (1.3, -0.7)  # pixels to the right and down
GAIN, OFFSET = torch.tensor([0.94, 0.88, 0.78]), torch.tensor([0.07, 0.03, 0.0])
TIMES = 20  # enlargement of differences
PLAIN = {"colour_match": "none", "align": "none", "feather": 0}


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A drawn picture, what an edit model made of it (recoloured, shifted, tinted), and the mask of its animal."""
    scene = world.held_out_scenes(SCENE + 1)[SCENE]
    picture, mask = world.render(scene, SIDE, with_mask=True)
    ideal = torch.from_numpy(world.render(world.edit(scene, colour=COLOUR), SIDE)).double() / 255
    moved = shifted_back(ideal, -SHIFT[0], -SHIFT[1]).float().clamp(0, 1)
    return torch.from_numpy(picture)[None].float() / 255, (moved * GAIN + OFFSET)[None], torch.from_numpy(mask)[None]


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture (1, H, W, 3) or a mask (1, H, W) in 0..1."""
    return Image.fromarray((picture[0].clamp(0, 1) * 255).round().byte().numpy()).convert("RGB")


def difference(picture: torch.Tensor, source: torch.Tensor) -> Image.Image:
    """What differs, enlarged TIMES."""
    return to_image((picture - source).abs() * TIMES)


def main() -> None:
    """Write web/docs/PalimpsestKeepOutside/*.jpg."""
    source, edited, mask = example()
    mask = mask.float()

    def keep(**changes) -> tuple[torch.Tensor, torch.Tensor]:
        done = KeepOutside.execute(source, edited, mask, **defaults(KeepOutside) | changes).args
        print(done[2])
        return done[:2]

    result, weights = keep(feather=4)
    pasted, _ = keep(**PLAIN)
    aligned, _ = keep(**PLAIN | {"align": "sub-pixel"})
    matched, _ = keep(**PLAIN | {"colour_match": "mean and spread"})
    folder = ROOT / "web" / "docs" / "PalimpsestKeepOutside"
    cells = {
        "keep": [(to_image(source), "original"), (to_image(edited), "edited: shifted, tinted"),
                 (to_image(result), "Keep Outside"), (to_image(weights), "mask it returns")],
        "difference": [(difference(edited, source), f"edited - original, x {TIMES}"),
                       (difference(result, source), f"result - original, x {TIMES}")],
        "match": [(to_image(pasted), "pasted by the mask alone"), (to_image(aligned), "aligned"),
                  (to_image(matched), "colours matched"), (to_image(result), "both, feather 4")],
    }  # fmt: skip
    for name, pictures in cells.items():
        print(save(panels(pictures), folder / f"{name}.jpg"))
