"""Draw the pictures of the help page of Train Context Adapter.

python dev.py draw contextdiff
"""

from __future__ import annotations

import torch
from benchmarks.scenes import defaults, drawn
from contextdiff.benchmark import Pocket, context_aware, plain_ddim
from make_pictures import ROOT, panels, save
from palimpsest.nodes.contextdiff.nodes import TrainContextAdapter
from PIL import Image
from pocket import world

SCENE, STEPS, KEPT, SEED, GUIDANCE = 5, 12, 0.75, 3, 2.0
RECIPE = {"steps": 120, "learning_rate": 2e-3, "batch_size": 4, "validate_every": 20, "rescue_filename": ""}


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture (1, H, W, 3) in 0..1."""
    return Image.fromarray((picture[0].clamp(0, 1) * 255).round().byte().numpy())


def main() -> None:
    """Write web/docs/PalimpsestTrainContextAdapter/*.jpg."""
    torch.set_num_threads(1)
    folder = ROOT / "web" / "docs" / "PalimpsestTrainContextAdapter"
    with torch.inference_mode():
        pocket = Pocket(True)
        scene = world.held_out_scenes(SCENE + 1)[SCENE]
        picture, caption = drawn([scene])[0], world.caption(scene)
        latent, prompt = pocket.latent(picture), pocket.encode([caption])
        adapter, plot, report, _ = TrainContextAdapter.execute(
            pocket.model, latent, prompt, **defaults(TrainContextAdapter) | RECIPE
        ).args
        print(report)
        levels = pocket.levels(round(STEPS / KEPT))[-STEPS - 1 :]  # as the host's samplers do at denoise 0.75

        def redrawn(sampler) -> Image.Image:
            return to_image(pocket.decode(pocket.sample(sampler, prompt, GUIDANCE, levels, latent, SEED)["samples"]))

        cells = [(to_image(picture), "your picture"), (redrawn(plain_ddim()), "redrawn, denoise 0.75"),
                 (redrawn(context_aware(adapter)), "with the trained adapter")]  # fmt: skip
    print(save(panels(cells), folder / "one_shot.jpg"))
    print(save(to_image(plot), folder / "plot.jpg"))
