"""Draw the pictures of the help pages of Feature Blend and its three companions.

python dev.py draw feature_blend
"""

from __future__ import annotations

import torch
from make_pictures import ROOT, Studio, example_scene, panels, save
from PIL import Image
from pocket import world

COLOUR, OTHER_COLOUR, PLACE, TUNING_STEPS = {"colour": "brown"}, {"colour": "yellow"}, {"place": "night"}, 100


def drawn(pictures: torch.Tensor) -> Image.Image:
    """The first picture of an IMAGE (B, H, W, 3)."""
    return Image.fromarray((pictures[0] * 255).round().byte().numpy())


def main() -> None:
    """Write web/docs/Palimpsest{FeatureBlend,TuneFeatureBlend,SaveBlendWeights,LoadBlendWeights}/*.jpg."""
    studio, scene = Studio(), example_scene()
    from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend

    docs, source = ROOT / "web" / "docs", Image.fromarray(world.render(scene))
    with torch.inference_mode():
        trajectory, noise = studio.invert(scene)
        was, animal = studio.prompt(world.caption(scene)), studio.animal(scene)
        around = 1 - animal

        def words(change: dict) -> str:
            return world.caption(world.edit(scene, **change))

        def blended(change: dict, **settings) -> Image.Image:
            chosen = studio.defaults(FeatureBlend) | settings
            model, report = FeatureBlend.execute(studio.model, trajectory, was, **chosen).args
            print(report)
            return studio.draw(model, words(change), noise)

        def alone(change: dict) -> Image.Image:
            return studio.draw(studio.model, words(change), noise)

        for name, change, mask, preset in (
            ("colour", COLOUR, animal, "PFB-Diff object"),
            ("place", PLACE, around, "PFB-Diff background"),
        ):
            cells = [
                (source, "your picture"),
                (alone(change), "new prompt alone"),
                (blended(change, mask=mask), "Feature Blend"),
                (blended(change, mask=mask, preset=preset), preset),
            ]
            print(save(panels(cells), docs / "PalimpsestFeatureBlend" / f"{name}.jpg"))
        cells = [
            (blended(COLOUR, mask=animal, blend_latents_until=v), f"latents until {v:g}") for v in (0.0, 0.5, 0.8, 1.0)
        ]
        print(save(panels(cells), docs / "PalimpsestFeatureBlend" / "latents.jpg"))
        cells = [(blended(COLOUR, mask=animal, alpha_inside=v), f"alpha_inside {v:g}") for v in (1.0, 0.9, 0.7, 0.5)]
        print(save(panels(cells), docs / "PalimpsestFeatureBlend" / "alpha.jpg"))

        chosen = studio.defaults(TuneFeatureBlend) | {"steps": TUNING_STEPS, "mask": animal}
        weights, plot, report = TuneFeatureBlend.execute(
            studio.model, trajectory, was, studio.prompt(words(COLOUR)), negative=studio.nothing, **chosen
        ).args
        print(report)
        tuned = blended(COLOUR, blend_weights=weights, mask=animal)
        elsewhere = blended(OTHER_COLOUR, blend_weights=weights, mask=animal)
        cells = [(alone(COLOUR), "new prompt alone"), (blended(COLOUR, preset="paper"), "alpha 0.5, not learned"),
                 (tuned, "learned alphas")]  # fmt: skip
        print(save(panels(cells), docs / "PalimpsestTuneFeatureBlend" / "learned.jpg"))
        print(save(drawn(plot), docs / "PalimpsestTuneFeatureBlend" / "plot.jpg"))
        cells = [(source, "your picture"), (tuned, "what the file gives back")]
        print(save(panels(cells), docs / "PalimpsestSaveBlendWeights" / "save.jpg"))
        cells = [(tuned, "the edit it was learned for"), (elsewhere, "the same file, another edit")]
        print(save(panels(cells), docs / "PalimpsestLoadBlendWeights" / "load.jpg"))
