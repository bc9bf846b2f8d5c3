"""Kinds of vision-language models: what each says around a picture, and how it is shown one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .spans import Span

BOUNDARY, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---- what a picture becomes -----------------------------------------------------------------------------------------


def siglip(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the vision tower of the Idefics models sees (n, patches, D), and which patches count: all of them."""
    side = pixels.shape[-1] // model.config.vision_config.patch_size
    patches = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
    return model.vision_model(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state, patches


def projected(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Idefics2: a token a patch; or, through its perceiver, as many as that has latents."""
    seen, patches = siglip(model, pixels)
    if perceiver:
        return model.connector(seen, attention_mask=patches.flatten(1))
    return model.connector.modality_projection(seen)


def shuffled(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Idefics3, SmolVLM: scale x scale patches become the channels of one token (pixel shuffle)."""
    return model.connector(siglip(model, pixels)[0])


def merged(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Qwen's: merge x merge patches become one token; a still picture is a film of equal ones, a patch deep."""
    found = towered(model, pixels)
    found = getattr(found, "pooler_output", found)  # until transformers 4 it is given back as it is
    return found.reshape(len(pixels), -1, found.shape[-1])


def stacked(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Qwen3-VL (n, tokens, (1 + levels) D): as `merged`, with what its tower saw at some earlier levels behind it.

    Its language model adds those to a picture's tokens behind its first layers, one level a layer (DeepStack,
    arXiv:2406.04334).
    """
    found = towered(model, pixels)
    top, levels = found if isinstance(found, tuple) else (found.pooler_output, found.deepstack_features)
    found = torch.cat([top, *levels], dim=-1)  # until transformers 4 both are given back as they are
    return found.reshape(len(pixels), -1, found.shape[-1])


def towered(model: Any, pixels: Tensor) -> Any:
    """What a vision tower of Qwen's gives for pictures, cut into its patches in the order of its tokens."""
    vision_tower = model.config.vision_config
    patch, merge, count = vision_tower.patch_size, vision_tower.spatial_merge_size, len(pixels)
    rows = pixels.shape[-1] // patch
    parts = pixels.unflatten(3, (rows // merge, merge, patch)).unflatten(2, (rows // merge, merge, patch))
    order = (0, 2, 5, 3, 6, 1, 4, 7)  # pictures, tokens, patches in a token, channels, pixels
    parts = parts.permute(order)[..., None, :, :]
    depth = vision_tower.temporal_patch_size
    films = parts.expand(*parts.shape[:-3], depth, patch, patch).reshape(count * rows**2, -1)
    return model.visual(films, grid_thw=torch.tensor([[1, rows, rows]] * count, device=pixels.device))


def as_siglip(pixels: Tensor) -> Tensor:
    """Pictures in -1..1, as SigLIP and Qwen3-VL were trained on them."""
    return pixels


def as_clip(pixels: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in -1..1 as CLIP's were normalised, which Qwen2.5-VL was trained with."""
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_DEVIATION))
    return ((pixels + 1) / 2 - mean) / deviation


# ---- where tokens stand ---------------------------------------------------------------------------------------------


def positions_in_line(layouts: Sequence[Sequence[Span]], length: int) -> None:
    """One token behind the other, as transformers counts them where nothing is said."""
    return


def positions_in_pictures(layouts: Sequence[Sequence[Span]], length: int) -> Tensor:
    """Qwen's: positions in time, row and column (3, prompts, length) of tokens.

    They rise together, but for a picture's tokens, which have one time, and their own row and column from there on;
    what follows goes on behind its last row.
    """
    found = torch.zeros(3, len(layouts), length, dtype=torch.long)
    for prompt, spans in enumerate(layouts):
        begin = 0
        for span in spans:
            positions = positions_in_span(span)
            found[:, prompt, span.start : span.end] = begin + positions
            begin += int(positions[0, -1]) + 1
    return found


def positions_in_span(span: Span) -> Tensor:
    """(3, tokens): a text's rise together; a picture's are a square between one token before and one behind."""
    positions = torch.arange(span.tokens).expand(3, -1).clone()
    if span.picture is not None:
        side = math.isqrt(span.tokens - 2)
        token = torch.arange(side**2)
        positions[:, 1:-1] = 1 + torch.stack([torch.zeros_like(token), token // side, token % side])
        positions[:, -1] = 1 + side
    return positions


# ---- the families ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How a kind of model is shown a picture.

    kind: its model_type. parts: the model_types that those of its parts may have that transformers reads any of; the
    first where a folder says none. before, after: what its text says around a picture's tokens, each of which is
    `image`. look: (model, pictures (n, 3, side, side), perceiver) -> (n, tokens, hidden width, or several times that
    where the language model is given more levels of what was seen). since: the transformers that first reads it. scale:
    patches along the side of a token, of its configuration. has_perceiver: it may be left out. tokens: a picture where
    nothing else is said, None: max_tokens; max_tokens: None: as many as its vision tower was trained on. normalised:
    pictures in -1..1 as its vision tower wants them. text: the name of its language model. positions: of prompts'
    tokens, as that counts them. turn: what stands before a question and behind it, where the model is to answer; ends:
    tokens that end its answer, beside the tokenizer's own.
    """

    name: str
    kind: str
    before: str
    after: str
    look: Callable[[Any, Tensor, bool], Tensor]
    scale: Callable[[Any], int]
    since: str = "4.52"
    has_perceiver: bool = False
    tokens: int | None = None
    max_tokens: int | None = None
    image: str = IMAGE
    text: str = "text_model"
    normalised: Callable[[Tensor], Tensor] = as_siglip
    positions: Callable[[Sequence[Sequence[Span]], int], Tensor | None] = positions_in_line
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turn: tuple[str, str] = ("User:", "<end_of_utterance>\nAssistant:")
    ends: tuple[str, ...] = ("<end_of_utterance>",)


FAMILIES = {
    "idefics2": Family(
        name="Idefics2",
        kind="idefics2",
        parts={"text_config": ("mistral",)},
        before=BOUNDARY,
        after=BOUNDARY,
        look=projected,
        scale=lambda config: 1,
        has_perceiver=True,
        tokens=324,
    ),
    **{
        kind: Family(
            name=name,
            kind=kind,
            parts={"text_config": ("llama", "mistral")},
            before=BOUNDARY + GLOBAL,
            after=BOUNDARY,
            look=shuffled,
            scale=lambda config: config.scale_factor,
            turn=(f"{start}User:", "<end_of_utterance>\nAssistant:"),
        )
        for kind, name, start in (("idefics3", "Idefics3", ""), ("smolvlm", "SmolVLM", "<|im_start|>"))
    },
    **{
        kind: Family(
            name=name,
            kind=kind,
            before="<|vision_start|>",
            after="<|vision_end|>",
            look=look,
            scale=lambda config: config.vision_config.spatial_merge_size,
            since=since,
            tokens=324,
            max_tokens=16384,  # of its own processor's largest picture
            image="<|image_pad|>",
            text="language_model",
            normalised=normalised,
            positions=positions_in_pictures,
            turn=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
            ends=("<|im_end|>",),
        )
        for kind, name, look, since, normalised in (
            ("qwen2_5_vl", "Qwen2.5-VL", merged, "4.52", as_clip),
            ("qwen3_vl", "Qwen3-VL", stacked, "4.57", as_siglip),
        )
    },
}


def family_names() -> str:
    """The names of the families, in words."""
    *first, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(first)} and {last}"
