"""Draw the pictures of the help page of Cross-Attention Mask, on the pocket model.

python dev.py draw cross_attention
"""

from __future__ import annotations

import make_pictures
from make_pictures import ROOT, Studio, example_scene, panels, save
from PIL import Image
from pocket import world

COLOUR, OTHER, GUIDANCE = "blue", "yellow", 4.0


def shown(mask, picture: Image.Image) -> Image.Image:
    """A picture, dark where a MASK (1, H, W) is black."""
    light = Image.fromarray((mask[0] * 255).round().byte().numpy())
    return Image.composite(picture, picture.point(lambda value: value // 4), light)


def main() -> None:
    """Write web/docs/PalimpsestCrossAttentionMask/*.jpg."""
    make_pictures.GUIDANCE = GUIDANCE
    studio, scene = Studio(), example_scene()
    from benchmarks import scenes
    from palimpsest.nodes import words
    from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask

    torch, defaults = studio.torch, scenes.defaults(CrossAttentionMask)
    with torch.inference_mode():
        target = world.caption(world.edit(scene, colour=COLOUR))
        tokens, prompt, _ = words.select(studio.clip, target, COLOUR)
        _, noise = studio.invert(scene)
        source, animal = Image.fromarray(world.render(scene)), studio.animal(scene)[0]
        columns = torch.arange(animal.shape[-1])
        middle = (animal.sum(0) * columns).sum() / animal.sum()
        half = (columns < middle).float().expand(1, *animal.shape).contiguous()

        def patch(model, mask, chosen, **settings):
            return CrossAttentionMask.execute(model, mask, tokens=chosen, **defaults | settings).args[0]

        def draw(mask=half, chosen=tokens, **settings) -> Image.Image:
            return studio.draw(patch(studio.model, mask, chosen, **settings), prompt, noise)

        both = target.replace(COLOUR, f"{COLOUR} and {OTHER}")
        two = [words.select(studio.clip, both, word) for word in (COLOUR, OTHER)]
        regions = patch(patch(studio.model, half, two[0][0]), 1 - half, two[1][0])

        alone = studio.draw(studio.model, prompt, noise)
        left = draw()
        rows = {
            "sides": [
                (source, "your picture"),
                (alone, f"{COLOUR}, no mask"),
                (shown(half, source), "the mask"),
                (left, "inside"),
                (draw(side="outside"), "outside"),
            ],
            "regions": [
                (shown(half, source), f"{COLOUR}"),
                (shown(1 - half, source), f"{OTHER}"),
                (studio.draw(studio.model, two[0][1], noise), f"{COLOUR} and {OTHER}, no mask"),
                (studio.draw(regions, two[0][1], noise), "two Cross-Attention Masks"),
            ],
            "modes": [
                *((draw(mode=mode), mode) for mode in options_of("mode", CrossAttentionMask)),
                (draw(chosen=None), "after softmax, no tokens"),
            ],
            "strength": [
                *((draw(strength=value), f"strength {value:g}") for value in (0.0, 0.5, 0.8)),
                (left, "strength 1"),
                (draw(feather=24.0), "strength 1, feather 24"),
            ],
            "layers": [
                (left, "all"),
                *((draw(layers=name), name) for name in ("1/1 of the latent", "1/2 of the latent", "PFB-Diff object")),
            ],
            "percents": [
                (left, "0 to 1"),
                *((draw(end_percent=end), f"0 to {end:g}") for end in (0.5, 0.2)),
                (draw(start_percent=0.3), "0.3 to 1"),
            ],
        }
    for name, cells in rows.items():
        path = save(panels(cells), ROOT / "web" / "docs" / "PalimpsestCrossAttentionMask" / f"{name}.jpg")
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.1f} kB")


def options_of(name: str, node) -> list[str]:
    """The options of one of a node's combos."""
    return next(entry.options for entry in node.define_schema().inputs if entry.id == name)
