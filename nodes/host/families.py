"""Transformers whose attention we know: a table of families, and the layers of a model of one of them.

In most of these the tokens of text and picture stand in one sequence, text first, and every layer lets all of them look
at all. In some they are apart, as in a U-Net: the picture looks at itself, then at the text. A family is described by
data; what differs in the arithmetic of a network is none of our business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .prompts import is_unet


@dataclass(frozen=True)
class Family:
    """A kind of transformer.

    name: as people know it. kind: the host's class in comfy.model_base, itself and not one derived from it. blocks: by
    the block type that the host tells an attention, which of the network's lists these are. width: the network's own
    number of channels. numbered: whether the host tells an attention its block; where not, a block replacement does.
    refiner: the network's list of layers in which text looks at text before it meets the picture; "" without.
    pooled: whether a vector of the whole prompt acts beside its tokens, where no mask of tokens reaches. apart: whether
    the picture looks at text in an attention of its own. typed: whether the host tells an attention the type of its
    block, where there is one type only. adapted: whether the network makes another text of the encoded one before.
    meets: whether the host lets others see what blocks give back. own_checkpoint: whether the host runs replaced blocks
    under a checkpoint of its own. writes_over: whether its blocks write into their inputs. ratio: how many frames of a
    video each frame of its latent stands for, but for the first one, which stands for itself. rotates: the attention of
    a block whose queries and keys the host rotates by an operation without a gradient; "" without.
    """

    name: str
    kind: str
    blocks: tuple[tuple[str, str], ...]
    width: str = "hidden_size"
    numbered: bool = True
    refiner: str = ""
    pooled: bool = False
    apart: bool = False
    typed: bool = True
    adapted: bool = False
    meets: bool = True
    own_checkpoint: bool = False
    writes_over: bool = False
    ratio: int = 1
    rotates: str = ""


DOUBLE_AND_SINGLE = (("double", "double_blocks"), ("single", "single_blocks"))
FAMILIES = (
    Family("Z-Image and Lumina Image 2", "Lumina2", (("double", "layers"),), width="dim", refiner="context_refiner"),
    Family("FLUX.2 and Klein", "Flux2", DOUBLE_AND_SINGLE, writes_over=True),
    Family("FLUX.1", "Flux", DOUBLE_AND_SINGLE, pooled=True, writes_over=True),
    Family("Chroma", "Chroma", DOUBLE_AND_SINGLE, writes_over=True),
    Family("Qwen-Image", "QwenImage", (("double", "transformer_blocks"),), width="inner_dim"),
    Family("SD 3 and 3.5", "SD3", (("double", "joint_blocks"),), numbered=False, pooled=True, own_checkpoint=True),
    Family("Wan 2.1 and 2.2", "WAN21", (("double", "blocks"),), width="dim", apart=True, ratio=4),
    Family("Wan 2.2 5B", "WAN22", (("double", "blocks"),), width="dim", apart=True, ratio=4),
    Family(
        "Anima", "Anima", (("double", "blocks"),), width="model_channels", apart=True, typed=False, adapted=True,
        meets=False, ratio=4, rotates="self_attn",
    ),
)  # fmt: skip
JOINT_FAMILIES = tuple(family for family in FAMILIES if not family.apart)
NO_NUMBER = "the host does not tell its attention which layer it is"
NO_DOOR = "the host lets no other node into its attention"
MORE_STREAMS = "it reads other pictures or sound beside the clip in layers of their own, which is not served yet"
MISSING = {  # by the host's class: why it is not served
    "HiDream": NO_NUMBER,
    "PixArt": NO_DOOR,
    "HunyuanDiT": NO_DOOR,
    "ErnieImage": NO_DOOR,
    "WAN21_Vace": MORE_STREAMS,
    "WAN21_Camera": MORE_STREAMS,
    "WAN21_HuMo": MORE_STREAMS,
    "WAN22_Animate": MORE_STREAMS,
    "WAN22_S2V": MORE_STREAMS,
    "WAN21_SCAIL": MORE_STREAMS,
    "WAN21_SCAIL2": MORE_STREAMS,
    "CosmosPredict2": "its noise levels are of a kind of their own, which is not served yet",
    "HunyuanVideo": "a token refiner mixes its words before they meet the picture, which is not served yet",
    "ZImagePixelSpace": "the version that works on pixels is not served yet",
    "ChromaRadiance": "the version that works on pixels is not served yet",
}
NOT_DESCRIBED = "where its words stand is not described yet"


def video_ratio(model: Any) -> int:
    """Family.ratio of one of the host's models themselves; 1 where no family is known."""
    return next((family.ratio for family in FAMILIES if family.kind == type(model).__name__), 1)


def family_of(model: Any) -> Family | None:
    """The family of a host MODEL; None for a U-Net and for what is not served."""
    kind = type(model.model).__name__
    return next((family for family in FAMILIES if family.kind == kind), None)


def require_words(model: Any, technique: str, served: tuple[Family, ...] = FAMILIES) -> Family | None:
    """The family of a transformer whose words a technique can see, None for a U-Net; served: those that it knows.

    Raises ValueError for any other model, with what is missing.
    """
    family = family_of(model)
    if family is None and not is_unet(model):
        kind = type(model.model).__name__
        raise ValueError(
            f"{technique} works inside the attention of U-Net models (SD 1.x, SD 2.x, SDXL and their fine-tunes) and "
            f"of {', '.join(each.name for each in served)}; the connected model is {kind}: "
            f"{MISSING.get(kind, NOT_DESCRIBED)}. Load a checkpoint of one of those families."
        )
    return family


def patch_of(network: Any) -> int:
    """Cells of the latent on a side of one picture token."""
    size = network.patch_spatial if hasattr(network, "patch_spatial") else network.patch_size
    return size if isinstance(size, int) else size[-1]


def patch_in_time(network: Any) -> int:
    """Frames of a clip's latent in one picture token."""
    size = getattr(network, "patch_size", None)
    return getattr(network, "patch_temporal", 1) if isinstance(size, int | None) else size[0]


def text_multiple(network: Any) -> int:
    """To a multiple of how many tokens the network itself pads text and picture (Z-Image: 32)."""
    return getattr(network, "pad_tokens_multiple", None) or 1


def joint_keys(model: Any, family: Family) -> list[tuple[str, int, int]]:
    """The layers of a transformer, (block type, number, 0), in the order of a forward pass.

    Where text and picture are apart, both attentions of a block are one layer.
    """
    network = model.model.diffusion_model
    return [(name, i, 0) for name, blocks in family.blocks for i in range(len(getattr(network, blocks)))]


def block_names(family: Family, keys: Iterable[tuple[str, int, int]]) -> list[str]:
    """The network's own names of the blocks that layers stand in."""
    lists = dict(family.blocks)
    return [f"{lists[kind]}.{number}" for kind, number, _ in keys]


def thirds(model: Any, family: Family) -> dict[str, list[tuple[str, int, int]]]:
    """The layers of a transformer in three parts of the way: encoder, middle, decoder, and all.

    Transformers have one size of grid and no two halves: the names are those of a U-Net's blocks, by where they stand.
    """
    keys = joint_keys(model, family)
    first, last = len(keys) // 3, len(keys) - max(1, len(keys) // 3)
    return {"encoder": keys[:first], "middle": keys[first:last], "decoder": keys[last:], "all": keys}
