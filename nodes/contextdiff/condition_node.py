"""Class or Layout Context: what an adapter reads in the place of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ...kernels.contextdiff_conditions import class_map, nearest_colours, part_shares
from ...kernels.scripts import COMMAS
from .. import host, inputs
from ..quoting import quoted
from ..settings import Settings
from .condition import attached
from .config import CLASS, LAYOUT, LIMITS_BY_KIND

SIDE = 32  # cells of a layout a side, whatever its size
COLOURS = 64  # of a palette, at most
BETWEEN = rf"[{COMMAS};\s]+"  # numbers and colours of a list
FAR = 0.25  # a pixel farther than this from every colour of the palette is told of


@dataclass(frozen=True)
class ConditionSettings(Settings):
    """What is read; see PalimpsestContextCondition."""

    kind: str = LAYOUT
    palette: str = "#000000 #ffffff"
    label: str = "0"
    labels: int = 1000


class ContextCondition(io.ComfyNode):
    """ContextDiff's adapters for classes and layouts (arXiv:2402.16627, section 4.3): what they read."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestContextCondition",
            display_name="Class or Layout Context",
            category="palimpsest/context",
            description="Gives a context adapter a class or a layout of coloured parts to read in the place of the "
            "text. The model itself still reads the text. Use it behind the prompt for training and for sampling.",
            search_aliases=["contextdiff", "layout to image", "class to image", "segmentation map", "label"],
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt that the model reads. It leaves as it is, with the class or layout beside it.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[LAYOUT, CLASS],
                    tooltip="layout (default): a picture whose colours say which part is where. class: a number for "
                    "the whole picture, by label and labels (Show advanced inputs). Train and sample with the same "
                    "kind.",
                ),
                io.Image.Input(
                    "layout",
                    optional=True,
                    tooltip="Only for layout: the coloured parts of the picture, any size; it is read as 32 x 32 cells "
                    "over the whole picture. One for all pictures, or one for each. Convert Mask to Image makes one "
                    "of a mask.",
                ),
                io.String.Input(
                    "palette",
                    default="#000000 #ffffff",
                    multiline=True,
                    tooltip="Only for layout: the colours of the parts as #rrggbb, 2 to 64 of them, with blanks "
                    "between. A pixel belongs to the nearest one. Their order and number must be those of the "
                    "training.",
                ),
                io.String.Input(
                    "label",
                    default="0",
                    advanced=True,
                    tooltip="Only for class: the number of the picture's class, from 0; or one for each picture, as in "
                    "3, 0, 2.",
                ),
                io.Int.Input(
                    "labels",
                    default=1000,
                    min=2,
                    max=LIMITS_BY_KIND["labels"],
                    advanced=True,
                    tooltip="Only for class: how many classes there are. 1000 (default): ImageNet's, as in the paper. "
                    "It must be that of the training.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="For Train Context Adapter, Invert Picture, and the sampler.",
                ),
                io.String.Output(display_name="report", tooltip="What was read: each part's share, or the classes."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, positive, layout=None, **chosen) -> io.NodeOutput:
        settings = ConditionSettings.of(chosen)
        context, report = READ[settings.kind](settings, layout)
        return io.NodeOutput(attached(positive, context), report, ui=host.told(cls, report))


def read_layout(settings: ConditionSettings, layout: Tensor | None) -> tuple[Tensor, str]:
    """(a layout's map, what it holds in words). Raises ValueError for a missing layout and an odd palette."""
    if layout is None:
        raise ValueError("kind is layout and no layout is connected: connect a picture of coloured parts.")
    palette = colours(settings.palette)
    parts, distance = nearest_colours(layout[..., :3].float(), palette)
    maps = part_shares(parts, len(palette), SIDE)
    whole = maps.mean((0, 2, 3))
    told = ", ".join(f"part {i} {100 * float(share):.1f} %" for i, share in enumerate(whole))
    far = 100 * float((distance > FAR).float().mean())
    return maps, f"{len(layout)} layout, {told}" + (f"; {far:.1f} % are far from every colour" if far >= 0.1 else "")


def read_classes(settings: ConditionSettings, layout: Tensor | None) -> tuple[Tensor, str]:
    """(the classes' maps, which they are in words). Raises ValueError for what is no class."""
    found = []
    for word in re.split(BETWEEN, settings.label.strip()):
        if not re.fullmatch(r"\d{1,9}", word) or int(word) >= settings.labels:
            raise ValueError(
                f"label has {quoted(word)}: write whole numbers from 0 to {settings.labels - 1}, as in 3, 0, 2."
            )
        found.append(int(word))
    return class_map(torch.tensor(found), settings.labels), f"class {', '.join(map(str, found))} of {settings.labels}"


READ = {LAYOUT: read_layout, CLASS: read_classes}


def colours(palette: str) -> Tensor:
    """The colours (K, 3) in 0..1 of a palette as people write it. Raises ValueError for what is none."""
    words = re.split(BETWEEN, palette.strip())
    for word in words:
        if not re.fullmatch(r"#?[0-9a-fA-F]{6}", word):
            raise ValueError(f"palette has {quoted(word)}, which is no colour: write it as #rrggbb.")
    if not 2 <= len(words) <= COLOURS or len(set(map(str.lower, words))) < len(words):
        raise ValueError(f"palette has {len(words)} colours: give 2 to {COLOURS}, each once.")
    return torch.tensor([[int(word[-6:][i : i + 2], 16) for i in (0, 2, 4)] for word in words]) / 255
