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

from .families import FAMILIES, Family, family_names
from .folders import OFFLINE, managed, read_json, refuse_code, unreadable
from .vision_language import VisionLanguage

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    """Read a model folder. Raises ValueError for folders that family_of refuses and for incomplete weights."""
    family = family_of(folder)
    with torch.inference_mode(False), torch.no_grad():
        model, tokenizer = read(folder, DTYPES[dtype]())
        if not hasattr(model, family.text):
            raise ValueError(f"{family.name} needs transformers 4.52 or later: update it.")
        patcher = managed(hosted(model))
    for token in (family.image, family.after):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer of {folder.name} does not know {token}: copy the model's folder again.")
    return VisionLanguage(folder.name, family, patcher, tokenizer, perceiver and family.has_perceiver)


def family_of(folder: Path) -> Family:
    """The family of a model folder. Raises ValueError for one that is no such model, is pickled, or brings code."""
    name = folder.name
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(f"{name} is no model folder, it has no config.json: copy the whole folder of a model there.")
    refuse_code(folder, f"a model that transformers itself knows: {family_names()}")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{name} is a model of type {kind!r}; this node reads {family_names()}.")
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        if pickled:
            raise ValueError(
                f"{name} has its weights in {pickled[0]}, a format that can run code when it is read, and only "
                ".safetensors are: take the model in that format."
            )
        raise ValueError(f"{name} has no weights in it (no .safetensors): copy the model's weights there, too.")
    return FAMILIES[kind]


def read(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model without its word-predicting head, tokenizer) by transformers: offline, safetensors, none of its code."""
    import transformers
    from safetensors import SafetensorError

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = OFFLINE | {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **OFFLINE)
        model, info = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ImportError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise unreadable(folder, error) from error
    lacking = sorted(info["missing_keys"])
    if lacking or info.get("mismatched_keys"):
        odd = lacking or sorted(map(str, info["mismatched_keys"]))
        raise ValueError(
            f"{folder.name} is incomplete, {len(odd)} of its weights are missing or of another shape, {odd[0]} for "
            "one: copy the model's folder again."
        )
    return model, tokenizer


def hosted(model: nn.Module) -> nn.Module:
    """The model with the host's linear layers and token table in place of torch's: same weights, same names.

    What is left (norms, convolutions of the vision tower, position tables) is a thousandth of the weights.
    """
    import comfy.ops

    layers = comfy.ops.manual_cast
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
