"""Draw the picture of Caption Helper's help page: its own sheet of four drawings in ink.

python dev.py draw captions
"""

from __future__ import annotations

import torch
from lora_training import ink
from make_pictures import ROOT, save
from PIL import Image

FRAMES = (
    "an ink drawing of {}, highly detailed",
    "{} in the foreground, by Wang Hui",
    "a close-up picture of {}, monochrome",
    "{}",
)


def main() -> None:
    """Write web/docs/PalimpsestCaptionHelper/sheet.jpg."""
    from palimpsest.nodes.captions.nodes import CaptionHelper

    drawn, captions = ink.drawings(len(FRAMES))
    told = [frame.format(caption) for frame, caption in zip(FRAMES, captions, strict=True)]
    chosen = {"folder": "(none)", "drop_style": True, "drop_words": "", "keep_words": "", "trigger": ""}
    listed = {name: [value] for name, value in chosen.items()}
    sheet = CaptionHelper.execute(images=[torch.from_numpy(drawn)], captions=told, **listed).args[1]
    picture = Image.fromarray((sheet[0] * 255).round().byte().numpy())
    save(picture, ROOT / "web" / "docs" / "PalimpsestCaptionHelper" / "sheet.jpg")
