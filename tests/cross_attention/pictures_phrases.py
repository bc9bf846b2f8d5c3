"""Draw the picture of the help page of Phrase in Region, on the pocket model.

python dev.py draw cross_attention
"""

from __future__ import annotations

import make_pictures
from cross_attention.pictures import COLOUR, GUIDANCE, shown
from make_pictures import ROOT, Studio, example_scene, panels, save
from PIL import Image
from pocket import world


def main() -> None:
    """Write web/docs/PalimpsestRegionPhrase/regions.jpg."""
    make_pictures.GUIDANCE = GUIDANCE
    studio, scene = Studio(), example_scene()
    from benchmarks import scenes
    from palimpsest.nodes.cross_attention.nodes import RegionPhrase

    import nodes

    torch, defaults = studio.torch, scenes.defaults(RegionPhrase)
    with torch.inference_mode():
        usual, other = world.caption(scene), world.caption(world.edit(scene, colour=COLOUR))
        prompt = nodes.CLIPTextEncode().encode(studio.clip, usual)[0]
        _, noise = studio.invert(scene)
        source, animal = Image.fromarray(world.render(scene)), studio.animal(scene)[0]
        columns = torch.arange(animal.shape[-1])
        middle = (animal.sum(0) * columns).sum() / animal.sum()
        half = (columns < middle).float().expand(1, *animal.shape).contiguous()

        def draw(inside: float) -> Image.Image:
            chosen = defaults | {"phrase": other, "prompt_inside": inside}
            model, text = RegionPhrase.execute(studio.model, studio.clip, prompt, half, **chosen).args[:2]
            return studio.draw(model, text, noise)

        cells = [
            (studio.draw(studio.model, prompt, noise), "the prompt alone"),
            (shown(half, source), f"the mask; phrase: {COLOUR}"),
            (draw(1.0), "prompt_inside 1"),
            (draw(0.0), "prompt_inside 0"),
        ]
    path = save(panels(cells), ROOT / "web" / "docs" / "PalimpsestRegionPhrase" / "regions.jpg")
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.1f} kB")
