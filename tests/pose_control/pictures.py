"""Draw a picture of Apply KV's help page, a pose ControlNet beside it, and its template's thumbnail.

python dev.py draw pose_control
"""

from __future__ import annotations

import torch
from graphs.titles import thumbnail_of
from make_pictures import ROOT, SHOWN_POSE, Studio, example_scene, panels, save, thumbnail
from make_thumbnails import SIDE, with_inset
from PIL import Image
from pocket import world
from pose_control import pocket_control, skeleton
from pose_control.benchmark import END, STRENGTH
from pose_control.graph import TITLE


def main() -> None:
    """Write web/docs/PalimpsestApplyKV/pose.jpg and its template's thumbnail."""
    torch.set_num_threads(1)
    scene = example_scene()
    wanted = world.edit(scene, **SHOWN_POSE)
    with torch.inference_mode():
        studio = Studio()
        trajectory, noise = studio.invert(scene)
        model = studio.apply(studio.tune(scene, trajectory, inner_steps=0))
        words = studio.prompt(world.caption(wanted))
        without = studio.draw(model, words, noise)
        shown = {"control_net": pocket_control.narrow(), "image": skeleton.pictures([wanted]), "strength": STRENGTH}
        node = studio.host.ControlNetApplyAdvanced()
        both = node.apply_controlnet(words, studio.nothing, **shown, start_percent=0.0, end_percent=END)
        positive, studio.nothing = getattr(both, "args", both)
        posed = studio.draw(model, positive, noise)
    source, sticks = Image.fromarray(world.render(scene)), Image.fromarray(skeleton.draw(wanted))
    cells = [(source, "your picture"), (without, "running, by words"), (sticks, "a skeleton"), (posed, "and by it")]
    print(save(panels(cells), ROOT / "web" / "docs" / "PalimpsestApplyKV" / "pose.jpg"))
    tile = with_inset(thumbnail(posed, source), sticks, -14, 14).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    print(save(tile, thumbnail_of(TITLE)))


if __name__ == "__main__":
    main()
