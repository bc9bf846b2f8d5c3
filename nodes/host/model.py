"""The host's models: the families we know, their layers by name, and fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import family_of, joint_keys, patch_of, require_words
from .prompts import is_unet, text_width

LayerKey = tuple[str, int, int]
Grid = tuple[int, int]  # (height, width) in tokens, or in cells of a latent


@dataclass(frozen=True)
class AttentionLayer:
    """One self- or cross-attention layer of a U-Net, or joint one of a transformer, named as the host names it.

    In its patch options, that is: block "input", "middle" or "output", or "double" or "single" with index 0.
    """

    block: str
    number: int
    index: int
    channels: int

    @property
    def key(self) -> LayerKey:
        """("input" | "middle" | "output", block number, transformer within the block)."""
        return self.block, self.number, self.index

    def __str__(self) -> str:
        return f"{self.block} {self.number}.{self.index}"


def require_unet(model: Any, technique: str) -> Any:
    """The U-Net inside a host MODEL. Raises ValueError that names the family of any other model."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = model.model.diffusion_model
    if not isinstance(network, UNetModel):
        raise ValueError(
            f"{technique} works inside the attention of U-Net models (SD 1.x, SD 2.x, SDXL and their fine-tunes); "
            f"the connected model is {type(model.model).__name__}. Load a checkpoint of one of those families."
        )
    return network


def blocks(network: Any) -> list[tuple[str, int, Any]]:
    """(place, number, block) of a U-Net in the order in which a forward pass meets them."""
    return [
        *(("input", i, block) for i, block in enumerate(network.input_blocks)),
        ("middle", 0, network.middle_block),
        *(("output", i, block) for i, block in enumerate(network.output_blocks)),
    ]


def transformer_parts(network: Any) -> dict[LayerKey, Any]:
    """The transformer parts of a U-Net, each with attn1 (self) and attn2 (cross), in the order of a forward pass."""
    return {
        (name, number, index): part
        for name, number, block in blocks(network)
        for transformer in (m for m in block or () if hasattr(m, "transformer_blocks"))
        for index, part in enumerate(transformer.transformer_blocks)
    }


def self_attention_layers(model: Any, technique: str = "this node") -> list[AttentionLayer]:
    """Every self-attention layer of a host MODEL in the order in which a forward pass meets them."""
    return [
        AttentionLayer(*key, part.attn1.heads * part.attn1.dim_head)
        for key, part in transformer_parts(require_unet(model, technique)).items()
        if not getattr(part, "disable_self_attn", False)
    ]


def cross_attention_layers(model: Any, technique: str = "this node") -> list[AttentionLayer]:
    """Every layer of a host MODEL that looks at the prompt, in the order in which a forward pass meets them."""
    return [
        AttentionLayer(*key, part.attn2.heads * part.attn2.dim_head)
        for key, part in transformer_parts(require_unet(model, technique)).items()
        if part.attn2 is not None
    ]


def word_layers(model: Any, technique: str = "this node") -> list[AttentionLayer]:
    """Every layer in which the picture meets the words of its prompt, in the order of a forward pass.

    Those of a U-Net's cross-attention, or all of a transformer with joint attention. Raises ValueError for models of
    which that is not known, with what is missing.
    """
    family = require_words(model, technique)
    if family is None:
        return cross_attention_layers(model, technique)
    channels = getattr(model.model.diffusion_model, family.width)
    return [AttentionLayer(*key, channels) for key in joint_keys(model, family)]


def self_attention_modules(network: Any) -> dict[LayerKey, Any]:
    """The attention module of every self-attention layer, with its to_k and to_v."""
    return {key: part.attn1 for key, part in transformer_parts(network).items()}


def layout_fingerprint(model: Any) -> str:
    """A short hash of family, channels, text width and self-attention layers: equal for fine-tunes of one family."""
    channels = getattr(model.model.diffusion_model, "in_channels", None)
    return fingerprint(f"{layout(model)} {channels} {text_width(model)}")


def same_layout(model: Any, other: str) -> bool:
    """Whether a fingerprint is a model's; files that were saved before it held input channels and text width count."""
    return other in (layout_fingerprint(model), fingerprint(layout(model)))


def layout(model: Any) -> str:
    """Family, latent channels and attention layers of a model; of an unknown transformer, its stacks of blocks."""
    if family_of(model) is not None:
        layers = named_layers(word_layers(model))
    elif is_unet(model):
        layers = named_layers(self_attention_layers(model))
    else:
        layers = stacks(model)
    return f"{type(model.model).__name__} {model.get_model_object('latent_format').latent_channels} {layers}"


def named_layers(layers: Iterable[AttentionLayer]) -> str:
    """Layers by name, each with its channels."""
    return ";".join(f"{layer} {layer.channels}" for layer in layers)


def stacks(model: Any) -> str:
    """The stacks of blocks that a transformer consists of, each with its length."""
    found = model.model.diffusion_model.named_children()
    return ";".join(f"{name} {len(blocks)}" for name, blocks in found if isinstance(blocks, torch.nn.ModuleList))


def fingerprint(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def conditioning_fingerprint(conditioning: list) -> str:
    """A short hash of a CONDITIONING's text tensors: tells whether two nodes were given the same prompt."""
    digest = hashlib.sha256()
    for tensor, extra in conditioning:
        for part in (tensor, extra.get("pooled_output")):
            if isinstance(part, Tensor):
                digest.update(str(tuple(part.shape)).encode())
                digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_one_gpu(model: Any) -> None:
    """Raise ValueError for a model spread over several GPUs."""
    if getattr(model, "get_additional_models_with_key", lambda _: [])("multigpu"):
        raise ValueError("tuning runs on one GPU: connect the model from before the multi-GPU node.")


def single_device(model: Any) -> Any:
    """The model in the form that a backward pass can use: on one GPU, weights in ordinary memory.

    Raises ValueError as require_one_gpu does, and for one whose loader tells no way to load it so.
    """
    require_one_gpu(model)
    if not getattr(model, "is_dynamic", bool)():
        return model
    if getattr(model, "cached_patcher_init", None) is None:
        raise ValueError(
            "this model's loader does not let the host load it into ordinary memory, which learning needs: take one of "
            "ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram."
        )
    return model.get_non_dynamic_delegate()


@dataclass(frozen=True)
class Place:
    """A layer that looks at the prompt, and where it stands: its grid is the latent's divided by `scale`.

    level: 0 for the finest grid with cross-attention in this network, 1 for the next. last: no later decoder block
    works at that level.
    """

    layer: AttentionLayer
    scale: int
    level: int
    last: bool


def places(model: Any) -> list[Place]:
    """Every layer of word_layers, in the order of a forward pass. A transformer has one grid in all of them."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

    found = word_layers(model, "Cross-Attention Mask")
    if family_of(model) is not None:
        return [Place(layer, patch_of(model.model.diffusion_model), 0, False) for layer in found]
    scales, scale = {}, 1
    for name, number, block in blocks(model.model.diffusion_model):
        inside = list(block.modules()) if block is not None else []
        scale *= 2 if any(isinstance(module, Downsample) for module in inside) else 1
        scales[name, number] = scale
        scale //= 2 if any(isinstance(module, Upsample) for module in inside) else 1
    levels = sorted({scales[layer.key[:2]] for layer in found})
    last = {scales[layer.key[:2]]: layer.key[:2] for layer in found if layer.block == "output"}
    return [
        Place(layer, scales[at], levels.index(scales[at]), last.get(scales[at]) == at)
        for layer, at in ((layer, layer.key[:2]) for layer in found)
    ]
