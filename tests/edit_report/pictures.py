"""Draw the picture of Edit Report's help page: two ideal edits, one of them with a tinted background.

python dev.py draw edit_report
"""

from __future__ import annotations

import torch
from make_pictures import ROOT, panels, save
from palimpsest.nodes import plots
from palimpsest.nodes.edit_report import drawing, measuring
from pocket import world


def main() -> None:
    """Write web/docs/PalimpsestEditReport/report.jpg."""
    scenes = world.held_out_scenes(4)[2:]
    pairs = [world.render(scene, with_mask=True) for scene in scenes]
    source, mask = (torch.stack([torch.from_numpy(pair[i]) for pair in pairs]).float() for i in range(2))
    edits = [world.edit(scene, colour=colour) for scene, colour in zip(scenes, ("red", "brown"), strict=True)]
    edited = torch.stack([torch.from_numpy(world.render(edit)) for edit in edits]).float() / 255
    edited[1] = torch.where(mask[1, ..., None] > 0, edited[1], (edited[1] * 0.9 + 0.05))
    source /= 255
    edit = measuring.Edit(source, edited, mask)
    texts = ("source", "edited", f"difference x {drawing.AMPLIFIED:g}", "difference outside the mask")
    cells = [
        (plots.to_image(cell), text)
        for row in range(len(edited))
        for cell, text in zip(drawing.cells(edit, row), texts, strict=True)
    ]
    print(save(panels(cells), ROOT / "web" / "docs" / "PalimpsestEditReport" / "report.jpg"))
