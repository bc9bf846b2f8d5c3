"""Draw the pictures of the help pages of Train Context Adapter and Class or Layout Context.

python dev.py draw contextdiff
"""

from __future__ import annotations

import torch
from benchmarks.scenes import defaults, drawn
from contextdiff import layouts
from contextdiff.benchmark import Pocket, context_aware, plain_ddim
from graphs.titles import thumbnail_of
from make_pictures import ROOT, panels, save, thumbnail
from palimpsest.nodes.contextdiff.nodes import ContextCondition, TrainContextAdapter
from PIL import Image
from pocket import world

SIDE = 384  # of a tile of the template browser
SCENE, STEPS, KEPT, SEED, GUIDANCE = 5, 12, 0.75, 3, 2.0
RECIPE = {"steps": 120, "learning_rate": 2e-3, "batch_size": 4, "validate_every": 20, "rescue_filename": ""}


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture (1, H, W, 3) in 0..1."""
    return Image.fromarray((picture[0].clamp(0, 1) * 255).round().byte().numpy())


def condition(positive: list, layout: torch.Tensor) -> list:
    """A prompt with a layout behind it."""
    chosen = defaults(ContextCondition) | {"palette": layouts.PALETTE}
    return ContextCondition.execute(positive, layout=layout, **chosen).args[0]


def main() -> None:
    """Write the pictures below web/docs."""
    torch.set_num_threads(1)
    draw_layout()
    draw_one_shot()


def draw_layout() -> None:
    """Write web/docs/PalimpsestContextCondition/layout.jpg and its template's thumbnail."""
    with torch.inference_mode():
        pocket = Pocket(True)
        scene = world.held_out_scenes(SCENE + 1)[SCENE]
        picture, parts, caption = drawn([scene])[0], layouts.layout([scene]), world.caption(scene)
        latent, prompt = pocket.latent(picture), condition(pocket.encode([caption]), parts)
        recipe = RECIPE | {"steps": 40, "batch_size": 2, "validate_every": 0}
        adapter, _, report, _ = TrainContextAdapter.execute(
            pocket.model, latent, prompt, **defaults(TrainContextAdapter) | recipe
        ).args
        print(report)
        levels = pocket.levels(round(STEPS / KEPT))[-STEPS - 1 :]

        def redrawn(sampler) -> Image.Image:
            return to_image(pocket.decode(pocket.sample(sampler, prompt, GUIDANCE, levels, latent, SEED)["samples"]))

        cells = [(to_image(picture), "your picture"), (to_image(parts), "its layout, six parts"),
                 (redrawn(plain_ddim()), "redrawn, denoise 0.75"),
                 (redrawn(context_aware(adapter)), "with an adapter of the layout")]  # fmt: skip
    print(save(panels(cells), ROOT / "web" / "docs" / "PalimpsestContextCondition" / "layout.jpg"))
    shown = thumbnail(cells[-1][0], cells[1][0]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    print(save(shown, thumbnail_of("Edit by a prompt, the layout held (ContextDiff)")))


def draw_one_shot() -> None:
    """Write web/docs/PalimpsestTrainContextAdapter/*.jpg."""
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
