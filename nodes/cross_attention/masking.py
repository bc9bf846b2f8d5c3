"""Words that act in one part of the picture: a Cross-Attention Mask made from what a node is given."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...kernels.cross_attention_mask import feathered
from .. import host
from ..settings import Settings
from ..words import ChosenWords
from .attention import NAME, attach
from .layers import PFB_OBJECT, choose_layers
from .regions import MODES, Hidden, Region

INSIDE, OUTSIDE = "inside", "outside"


@dataclass(frozen=True)
class MaskSettings(Settings):
    """How, where in the network and when a mask acts; see PalimpsestCrossAttentionMask."""

    mode: str = "after softmax"
    side: str = INSIDE
    strength: float = 1.0
    feather: float = 0.0
    layers: str = "all"
    custom_layers: str = PFB_OBJECT
    mask_negative: bool = True
    start_percent: float = 0.0
    end_percent: float = 1.0
    hide_from_picture: bool = True
    hide_from_text: bool = False
    hide_from_refiner: bool = False

    @property
    def hidden(self) -> Hidden:
        """From which tokens of a transformer the words are hidden."""
        return Hidden(self.hide_from_picture, self.hide_from_text, self.hide_from_refiner)


def mask_words(
    model: Any, mask: Tensor, words: ChosenWords | None, settings: MaskSettings, remarks: host.Remarks = host.UNHEARD
) -> Any:
    """A clone of the model in which words act in one part of the picture. At strength 0 it is the model, bit for bit.

    words None: every token of the prompts. remarks hear of a latent that the mask does not fit. Raises ValueError for a
    model without such layers, for layers that it does not have, for an empty span of steps, for what is no mask, and
    for every token in a mode that only moves attention from one word to another.
    """
    mode, chosen = MODES[settings.mode], choose_layers(model, settings.layers, settings.custom_layers)
    family = host.family_of(model)
    if words is None and mode.renormalise and (family is None or family.apart):
        raise ValueError(
            f"mode {settings.mode!r} gives what a masked word loses to the prompt's other words, and without tokens "
            "there are none: connect tokens from Select Words, or take mode 'after softmax'."
        )
    region = Region(
        name=f"{NAME}.{uuid.uuid4().hex}",
        words=words,
        mask=softened(mask, settings.feather),
        mode=mode,
        outside=settings.side == OUTSIDE,
        strength=settings.strength,
        layers=frozenset(layer.key for layer in chosen),
        window=host.Window.of(model, settings.start_percent, settings.end_percent),
        mask_negative=settings.mask_negative,
        remarks=remarks,
        hidden=settings.hidden,
    )
    patched = model.clone()
    if settings.strength > 0:
        attach(patched, chosen, regions=(region,))
    return patched


def report(mask: Tensor, words: ChosenWords | None, settings: MaskSettings, family: host.Family | None = None) -> str:
    """What was asked for, whether it comes to nothing, and on which ways a transformer still hands the words on."""
    named = "all words" if words is None else f"the words {words.quoted}"
    white = settings.side == INSIDE
    colour = host.one_colour(mask)
    if settings.strength == 0:
        return "strength is 0: nothing is masked"
    if colour is None:
        share = float(mask.float().mean())
        acting = f"{named} act {settings.side} the mask, in {share if white else 1 - share:.0%} of the picture"
        return acting if words is None or family is None else acting + ways_left(settings.hidden, family)
    if (colour == "white") == white:
        return f"the mask is {colour} all over and side {settings.side}: {named} act everywhere, nothing is masked"
    return f"the mask is {colour} all over and side {settings.side}: {named} act nowhere; paint where they may act" + (
        ", in Load Image's mask editor" if colour == "black" else ""
    )


def ways_left(hidden: Hidden, family: host.Family) -> str:
    """On which ways words still reach the rest of a transformer's picture."""
    ways = [
        way
        for way, open_there in (
            ("by the picture's own tokens (hide_from_picture)", not hidden.picture),
            ("through the prompt's other tokens (hide_from_text)", not hidden.text and not family.apart),
            ("in the prompt's other words, with which the network mixes them before", family.adapted),
            ("through the layers that refine the prompt (hide_from_refiner)", family.refiner and not hidden.refiner),
            ("in the prompt's pooled vector", family.pooled),
        )
        if open_there
    ]
    return f"; they still reach the rest of it {', '.join(ways)}" if ways else ""


def softened(mask: Tensor, feather: float) -> Tensor:
    """A MASK (B, H, W) in 0..1 with edges that fade over some pixels. Raises ValueError for what is no mask."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    host.picture_rows(mask, len(mask), 1, 1)
    return feathered(mask.clamp(0, 1), feather)
