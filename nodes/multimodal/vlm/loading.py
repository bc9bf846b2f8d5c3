"""Vision-language models out of the folders that transformers writes, under the host's memory management.

A model is read once, offline, from .safetensors, by transformers' own classes; its large layers are then exchanged for
the host's of the same name and weights, so that the host casts, streams and offloads them as those of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import host
from ...quoting import quoted
from .families import FAMILIES, Family, family_names
from .folders import allowed_weights, configuration, name_of, read_json, read_tokenizer
from .reading import COPY_AGAIN, managed, read_model
from .vision_language import VisionLanguage


def best_dtype() -> torch.dtype:
    """bfloat16 where the host's device computes in it, else float16 or float32 as the host would choose."""
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


DTYPES: dict[str, Callable[[], torch.dtype]] = {
    "auto": best_dtype,
    "bfloat16": lambda: torch.bfloat16,
    "float16": lambda: torch.float16,
    "float32": lambda: torch.float32,
}


def load_vlm(folder: Path, dtype: str = "auto", perceiver: bool = False) -> VisionLanguage:
    """Read a model folder. Raises ValueError for folders that are not allowed, and for incomplete weights."""
    family, name = family_of(folder), name_of(folder)
    with torch.inference_mode(False), torch.no_grad():
        model, tokenizer = read(folder, family, DTYPES[dtype]())
        if not hasattr(model, family.text):
            raise ValueError(too_old(family))
        patcher = managed(hosted(model))
    require_tokens(tokenizer, family, model.get_input_embeddings().num_embeddings, name)
    return VisionLanguage(name, family, patcher, tokenizer, perceiver and family.has_perceiver, folder)


def too_old(family: Family) -> str:
    """What to do where the transformers of this machine does not read a family."""
    import transformers

    return (
        f"{family.name} needs transformers {family.since} or later, here is {transformers.__version__}: update it, or "
        "take a model of another family."
    )


def require_tokens(tokenizer: Any, family: Family, known: int, name: str) -> None:
    """Raise ValueError for a tokenizer without the family's own tokens, or of more than the model knows."""
    for token in (family.image, family.after):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer of {name} does not know {token}: {COPY_AGAIN}.")
    if len(tokenizer) > known:
        raise ValueError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its weights know {known}: {COPY_AGAIN}."
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} names neither a first nor a last token: {COPY_AGAIN}.")


def family_of(folder: Path) -> Family:
    """The family of a model folder. Raises ValueError for one that is no such model."""
    name, config = name_of(folder), read_json(folder, "config.json")
    if not config:
        raise ValueError(f"{name} is no model folder, it has no config.json: copy the whole folder of a model there.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{name} is a model of type {quoted(kind)}; this node reads {family_names()}.")
    return FAMILIES[kind]


def read(folder: Path, family: Family, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model without its word-predicting head, tokenizer) by transformers, of what a folder may say."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family.kind not in CONFIG_MAPPING:
        raise ValueError(too_old(family))
    files = allowed_weights(folder, f"a model that transformers itself knows: {family_names()}")
    config = configuration(folder, family.kind, family.parts)
    require_sides(config, name_of(folder))
    tokenizer = read_tokenizer(folder, config)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    make, load = transformers.AutoModel.from_config, transformers.AutoModel.from_pretrained
    options = {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
    return read_model(name_of(folder), folder, files, config, make=make, load=load, **options), tokenizer


def require_sides(config: Any, name: str) -> None:
    """Raise ValueError where what pictures and prompts are measured by is no whole number of 1 or more."""
    text = ("hidden_size", "intermediate_size", "max_position_embeddings")
    seen = ("patch_size", "hidden_size", *(["image_size"] if hasattr(config.vision_config, "image_size") else []))
    for part, names in ((config.text_config, text), (config.vision_config, seen)):
        for key in names:
            value = getattr(part, key, None)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"config.json of {name} has {key} {quoted(value)}, a whole number of 1 or more is read: "
                    f"{COPY_AGAIN}."
                )


def hosted(model: nn.Module) -> nn.Module:
    """The model with the host's linear layers and token table in place of torch's: same weights, same names.

    What is left (norms, convolutions of the vision tower, position tables) is a thousandth of the weights.
    """
    import comfy.ops

    layers = host.whole(comfy.ops.manual_cast)
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                made = layers.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            elif child is table:
                made = layers.Embedding(child.num_embeddings, child.embedding_dim, device="meta")
            else:
                continue
            made.weight = child.weight
            made.bias = getattr(child, "bias", None)
            setattr(parent, name, made)
    return model


def with_lora(vlm: VisionLanguage, weights: dict[str, Tensor], strength: float, name: str) -> VisionLanguage:
    """The model with a LoRA of its own on it. Raises ValueError for a file that fits none of its layers.

    Files as PEFT writes them (base_model.model.<layer>.lora_A.weight) and as this pack does (<layer>.lora_A.weight).
    """
    import comfy.lora

    keys = {}
    for key in vlm.patcher.model.state_dict():
        if key.endswith(".weight"):
            layer = key.removeprefix("model.").removesuffix(".weight")
            starts = ("", "model.", "base_model.model.", "base_model.model.model.")
            keys |= {start + layer: key for start in starts}
    patcher = vlm.patcher.clone()
    patches = comfy.lora.load_lora(weights, keys, log_missing=False)
    taken = patcher.add_patches(patches, strength)
    if not taken:
        raise ValueError(
            f"{name} fits no layer of {vlm.name}: pick a LoRA that was trained on this vision-language model; one for "
            "the U-Net belongs in Load LoRA."
        )
    return replace(vlm, patcher=patcher)
