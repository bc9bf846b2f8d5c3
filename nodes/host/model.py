"""The one place that knows the host's models, options and dictionaries."""

from __future__ import annotations

import hashlib
import html
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LayerKey = tuple[str, int, int]
OF_A_NODE = "palimpsest_of_a_node"  # key in a run's options: one of our nodes runs the model, no sampler does


@dataclass(frozen=True)
class AttentionLayer:
    """One self- or cross-attention layer of a U-Net, named as the host names it in its patch options."""

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


def self_attention_modules(network: Any) -> dict[LayerKey, Any]:
    """The attention module of every self-attention layer, with its to_k and to_v."""
    return {key: part.attn1 for key, part in transformer_parts(network).items()}


def layout_fingerprint(model: Any) -> str:
    """A short hash of family, latent channels and self-attention layout: equal for fine-tunes of one architecture."""
    layers = ";".join(f"{layer} {layer.channels}" for layer in self_attention_layers(model))
    text = f"{type(model.model).__name__} {model.model.latent_format.latent_channels} {layers}"
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


def chunk_rows(options: dict, rows: int) -> tuple[int, int]:
    """(chunks, pictures): the host stacks one chunk of B pictures per cond, so rows = chunks * B.

    Raises ValueError if another node's patch added rows that break this order.
    """
    chunks = len(options["cond_or_uncond"])
    if rows % chunks:
        raise ValueError(
            f"attention got {rows} rows for {chunks} prompts: another node on this model adds rows of its own "
            "(a reference picture); put that node after this one or take it out."
        )
    return chunks, rows // chunks


def run_attention(options: dict, previous: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
    """The attention the host would have run here: an earlier node's replacement if there is one, else its own.

    query (R, N, C), key and value (R, M, C) after projection, heads not split -> (R, N, C).
    """
    if previous is not None:
        if mask is not None:
            raise ValueError(
                "a strength other than 1 in mode extend, and source masks that differ within a batch, cannot pass "
                "through another node's attention replacement: set strength to 1, or take the other node out."
            )
        return previous(query, key, value, options)
    from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked

    run = optimized_attention if mask is None else optimized_attention_masked
    extra = {} if mask is None else {"mask": mask}
    return run(
        query,
        key,
        value,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
        **extra,
    )


# Replacements of the host's own nodes that take as many keys as queries for granted.
SQUARE_ONLY = ("comfy_extras.nodes_sag",)


def replace_attention(
    patched: Any, name: str, layers: list[AttentionLayer], make: Callable[[Any], Callable], longer: bool = False
) -> None:
    """Put a replacement ("attn1" or "attn2") on some layers: make(previous), which calls what was there before.

    It stands under the name of the whole block: the host prefers a single layer's name to a block's, so that under the
    former no node could take a block for a pass of its own any more (perturbed attention does). It must therefore look
    at options["block_index"]. Layers that have a replacement of their own get it there as well. longer: it will pass
    more keys than queries on; raises ValueError where a node of the host cannot take them.
    """
    slots = patched.model_options.get("transformer_options", {}).get("patches_replace", {}).get(name, {})
    present = {key: slots[key] for key in slots}
    for key in sorted({layer.key[:2] for layer in layers} | {la.key for la in layers if la.key in present}, key=str):
        previous = present.get(key)
        if longer and getattr(previous, "__module__", None) in SQUARE_ONLY:
            raise ValueError(
                f"another node records the attention of block {' '.join(map(str, key))} and expects as many keys as "
                "queries (Self-Attention Guidance): put that node after this one."
            )
        getattr(patched, f"set_model_{name}_replace")(make(previous), *key)


def layer_key(options: dict) -> LayerKey:
    """The layer that calls an attention replacement."""
    return (*options["block"], options["block_index"])


class FixedControl:
    """A ControlNet whose output is taken as given: the host loads some with trainable weights, which cannot be here."""

    def __init__(self, control: Any):
        self.control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        """The control's output, without a gradient."""
        with torch.no_grad():
            return self.control.get_control(*args, **kwargs)


def with_fixed_controls(*prompts: list | None) -> list[list | None]:
    """CONDITIONINGs in which every ControlNet is fixed; those that share one still do, so that they run together."""
    fixed: dict[int, FixedControl] = {}

    def fix(extra: dict) -> dict:
        control = extra.get("control")
        return extra if control is None else extra | {"control": fixed.setdefault(id(control), FixedControl(control))}

    return [None if prompt is None else [[tensor, fix(extra)] for tensor, extra in prompt] for prompt in prompts]


def parameters_in_gradient(model: Any, first: AttentionLayer) -> list[str]:
    """Keys, as the host's patcher names them, of the U-Net parameters that a gradient into layer `first` touches.

    They lie at or behind it in a forward pass; in hosts that leave requires_grad on, the others count too.
    """
    order = {"input_blocks": 0, "middle_block": 1, "output_blocks": 2, "out": 3}
    start = ({"input": 0, "middle": 1, "output": 2}[first.block], first.number)
    keys = []
    for name, module in model.model.diffusion_model.named_modules():
        if not hasattr(module, "weight_function"):
            continue
        parts = name.split(".")
        number = int(parts[1]) if parts[0] in ("input_blocks", "output_blocks") else 0
        behind = (order.get(parts[0], -1), number) >= start
        for key, parameter in module.named_parameters(recurse=False):
            if behind or parameter.requires_grad:
                keys.append(f"diffusion_model.{name}.{key}")
    return keys


def show_text(node_id: Any, text: str) -> None:
    """Show a line of text under a node in the graph editor, which takes it for HTML; silent where no server runs."""
    running = sys.modules.get("server")  # never imported for this: without a server there is nobody to tell
    server = getattr(getattr(running, "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(html.escape(text, quote=False), node_id)


def node_id(node: Any) -> Any:
    """The id of the node that runs, for messages under it; None outside of a graph."""
    return getattr(node.hidden, "unique_id", None)


class ProgressText:
    """A line of text under a node that changes a few times a second at most."""

    def __init__(self, node_id: Any, seconds: float = 0.3):
        self.node_id, self.seconds, self.last = node_id, seconds, 0.0

    def update(self, text: str, now: bool = False) -> None:
        """Show the text if enough time has passed, or `now`."""
        if now or time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            show_text(self.node_id, text)


def single_device(model: Any) -> Any:
    """The model in the form that a backward pass can use: on one GPU, weights in ordinary memory.

    Raises ValueError for a model spread over several GPUs.
    """
    if getattr(model, "get_additional_models_with_key", lambda _: [])("multigpu"):
        raise ValueError("tuning runs on one GPU: connect the model from before the multi-GPU node.")
    return model.get_non_dynamic_delegate() if getattr(model, "is_dynamic", bool)() else model


def picture_rows(mask: Tensor, pictures: int, height: int, width: int, what: str = "mask") -> Tensor:
    """A MASK as (pictures, 1, height, width) weights in 0..1: any size in, area-averaged, batch 1 or `pictures`.

    Raises ValueError for another batch, NaN, or no pixels.
    """
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    if mask.numel() == 0 or not torch.isfinite(mask).all():
        raise ValueError(f"the {what} is empty or holds NaN: connect a mask with values from 0 to 1.")
    if mask.shape[0] not in (1, pictures):
        raise ValueError(
            f"the {what} has {mask.shape[0]} pictures, the batch has {pictures}: give one mask for all, or one for "
            "each."
        )
    small = torch.nn.functional.interpolate(mask.clamp(0, 1)[:, None], size=(height, width), mode="area")
    return small.expand(pictures, -1, -1, -1)
