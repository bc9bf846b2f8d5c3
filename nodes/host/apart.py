"""Transformers whose picture looks at itself and at its text in two attentions of a block, as a U-Net does.

The host tells both the same block, so that they are told apart by how many keys there are; where these are as many, by
their order, which is picture, vision tokens of CLIP, text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .adapted import IDS, adapted_rows
from .call import NAME, ModelCall
from .families import Family
from .model import LayerKey

if TYPE_CHECKING:
    from torch import Tensor

    from .joint import Sequence

PICTURE, VISION, TEXT = "picture", "vision", "text"


@dataclass(frozen=True, eq=False)
class Seen:
    """Which attention it is: in what call and layer, and whether text and picture are among its keys."""

    call: ModelCall
    layer: LayerKey | None
    text: bool = True
    picture: bool = True


def text_length(text: Tensor | None, conds: Mapping[str, Any]) -> int:
    """Tokens of text that the picture looks at. Outside of inference the host lets Anima adapt its text in the call."""
    return 0 if text is None else adapted_rows(text, conds.get(IDS))


def seen_apart(
    family: Family, call: ModelCall, sequence: Sequence, layer: LayerKey | None, tokens: int, keys: int
) -> Seen | None:
    """What an attention of `tokens` queries to `keys` keys is; None where it sees neither text nor picture.

    Raises ValueError where the host does not tell the block, and for keys that belong to another node.
    """
    if layer is None:
        raise ValueError(
            f"this ComfyUI does not tell the attention of {family.name} which block it is in: update it (0.30 does)."
        )
    there = {PICTURE: tokens, VISION: sequence.vision, TEXT: sequence.text}
    fitting = [name for name, count in there.items() if count == keys and count]
    if not fitting:
        raise ValueError(
            f"a layer of {family.name} looks at {keys} tokens, and the picture has {tokens}, its text "
            f"{sequence.text}: another node adds, merges or shortens some. Take that node out."
        )
    name = fitting[0]
    if len(fitting) > 1:
        times = call.kept((NAME, "apart", layer, keys), lambda: [0])
        name = fitting[times[0] % len(fitting)]
        times[0] += 1
    return None if name == VISION else Seen(call, layer, text=name == TEXT, picture=name == PICTURE)
