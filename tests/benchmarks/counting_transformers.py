"""What the pack adds to a transformer's step, counted as counting.py counts. Import it where the host can be imported.

The networks are the host's own at full size, as its loaders find the published files: Z-Image, FLUX.1, FLUX.2 dev,
Qwen-Image, Wan 2.1 14B (a clip of one frame) and Anima, at 1024 pixels in bfloat16, with as many tokens of text as the
host gives a short prompt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import tiny_transformers
import torch
from benchmarks import counting
from benchmarks.counting import META, Cost, MetaPatcher, meta_host
from benchmarks.counting_masks import TOKENS, CountSecondCall
from palimpsest.kernels.joint_attention import Share
from palimpsest.nodes import host
from palimpsest.nodes.attention_map.nodes import AttentionMap
from palimpsest.nodes.cross_attention import joint as joint_words
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import reference
from palimpsest.nodes.host import sampling as host_sampling
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.words import ChosenWords

MANY = 1 << 60  # bytes: there is always room for a record


@dataclass(frozen=True)
class Transformer:
    """A family of tests/tiny_transformers.py at full size. layout: what differs from its small network there.

    tokens: of a prompt as the host hands it over, text wide; cells: of a side of the latent at 1024 pixels. guidance:
    what such a model is sampled with, 1 for those that were distilled to a guidance input.
    """

    name: str
    kind: str
    layout: dict[str, Any]
    tokens: int
    text: int
    guidance: float
    pooled: int = 0
    cells: int = 128

    @property
    def small(self) -> tiny_transformers.Tiny:
        """The small one of the family."""
        return tiny_transformers.EVERY[self.kind]

    def latent(self) -> torch.Tensor:
        """A LATENT's tensor of one picture, all ones: the host leaves an empty one unscaled."""
        frames = (1,) if self.small.frames else ()
        return torch.ones(1, self.small.channels, *frames, self.cells, self.cells)

    def prompt(self) -> list:
        """A CONDITIONING of the family's width."""
        pooled = {"pooled_output": torch.zeros(1, self.pooled)} if self.pooled else {}
        return [[torch.zeros(1, self.tokens, self.text), pooled]]


TRANSFORMERS = {
    each.name: each
    for each in (
        Transformer(
            "Z-Image", "zimage",
            {"dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "multiple_of": 256,
             "axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8 / 3},
            tokens=64, text=2560, guidance=5.0,
        ),
        Transformer(
            "FLUX.1", "flux",
            {"vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
             "depth": 19, "depth_single_blocks": 38},
            tokens=256, text=4096, guidance=1.0, pooled=768,
        ),
        Transformer(
            "FLUX.2 dev", "flux2",
            {"context_in_dim": 15360, "hidden_size": 6144, "mlp_ratio": 3.0, "num_heads": 48, "depth": 8,
             "depth_single_blocks": 48, "guidance_embed": True},
            tokens=512, text=15360, guidance=1.0, cells=64,
        ),
        Transformer(
            "Qwen-Image", "qwen", {"num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584},
            tokens=64, text=3584, guidance=4.0,
        ),
        Transformer(
            "Wan 2.1 14B", "wan",
            {"dim": 5120, "ffn_dim": 13824, "freq_dim": 256, "text_dim": 4096, "num_heads": 40, "num_layers": 40},
            tokens=512, text=4096, guidance=5.0,
        ),
        Transformer(
            "Anima", "anima",
            {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "model_channels": 2048, "num_blocks": 28,
             "num_heads": 16, "mlp_ratio": 4.0, "crossattn_emb_channels": 1024, "adaln_lora_dim": 256},
            tokens=512, text=1024, guidance=4.0,
        ),
    )
}  # fmt: skip


def build(family: Transformer) -> Any:
    """A ModelPatcher around the host's own network of that size, without weights."""
    small = family.small
    module, _, name = f"comfy.ldm.{small.network}".rpartition(".")
    given = {"dtype": torch.bfloat16, "device": META, "operations": comfy.ops.disable_weight_init}
    layout = small.layout | family.layout
    with torch.inference_mode():
        network = getattr(importlib.import_module(module), name)(**layout, **given)
        config = getattr(comfy.supported_models, small.config)({"image_model": family.kind, "dim": 3840} | layout)
        config.unet_config = {"disable_unet_model_creation": True, "dtype": torch.bfloat16,
                              "in_channels": small.channels, "out_channels": small.channels}  # fmt: skip
        made = getattr(comfy.model_base, small.kind)(config, device=META)
        made.diffusion_model = network
        made.model_sampling.to(META)
    patcher = MetaPatcher(made.eval(), META, META)
    patcher.model_options["transformer_options"]["optimized_attention_override"] = counting.fused
    return patcher


# ---- what meta tensors cannot ---------------------------------------------------------------------------------------


def known_shares(regions: Any, words: Any, places: Any, attention: Any, free: Any) -> list[Share] | None:
    """Which queries see what, found on the CPU and then put where the queries are: its numbers are values."""
    plain = SimpleNamespace(
        tokens=attention.tokens,
        query=SimpleNamespace(device=torch.device("cpu")),
        key=SimpleNamespace(shape=attention.key.shape),
        sequence=attention.sequence,
        layer=attention.layer,
    )
    found = SEEN_BY(regions, words, places, plain, free)
    return found and [there(share) for share in found]


SEEN_BY = joint_words.seen_by


def there(thing: Any) -> Any:
    """A share, or a group of it, with its tensors on the meta device."""
    moved = {}
    for name, value in vars(thing).items():
        if isinstance(value, torch.Tensor):
            moved[name] = value.to(META)
        elif isinstance(value, tuple):
            moved[name] = tuple(map(there, value))
    return replace(thing, **moved)


@contextmanager
def host_without_values(memory: int = MANY) -> Iterator[Any]:
    """meta_host, in which a mask is found and so many bytes are free; the device is as large as one likes."""
    found = mock.patch.object(joint_words, "seen_by", known_shares)
    free = mock.patch.object(reference, "free_memory", lambda: memory)
    device = mock.patch.object(comfy.model_management, "get_total_memory", lambda _: MANY)
    with found, free, device, meta_host() as answers:
        yield answers


# ---- what is counted ------------------------------------------------------------------------------------------------


def words_of(family: Transformer, number: int = 1) -> ChosenWords:
    """Some words of TOKENS tokens each."""
    places = tuple(tuple(range(1 + TOKENS * i, 1 + TOKENS * (i + 1))) for i in range(number))
    return ChosenWords(tuple(f"word {i}" for i in range(number)), places, family.prompt()[0][0])


def masked(model: Any, family: Transformer, **chosen: Any) -> Any:
    """The model behind a Cross-Attention Mask that hides a word from half of the picture."""
    mask = (torch.arange(64.0) < 32).float().expand(1, 64, 64)
    given = counting.widgets(CrossAttentionMask, mask_negative=True, **chosen)
    return CrossAttentionMask.execute(model, mask, tokens=words_of(family), **given).args[0]


def watched(model: Any, family: Transformer, words: int, **chosen: Any) -> Any:
    """The model behind an Attention Map of some words."""
    return AttentionMap.execute(model, words_of(family, words), **counting.widgets(AttentionMap, **chosen)).args[0]


def trajectory(model: Any, family: Transformer) -> host.Trajectory:
    """A picture's path of one step."""
    latent = family.latent()
    latent = latent.squeeze(2) if latent.ndim == 5 else latent
    with torch.inference_mode():
        return host.Trajectory(
            sigmas=(1.0, 0.0),
            latents=torch.stack([latent, latent]),
            guidance=1.0,
            prompt=host.conditioning_fingerprint(family.prompt()),
            layout=host.layout_fingerprint(model),
            flow=True,
        )


def recorded(model: Any, family: Transformer, layers: str) -> Any:
    """What Tune KV records of a picture at one step."""
    given = counting.widgets(TuneKV, inner_steps=0, layers=layers)
    return TuneKV.execute(model, trajectory(model, family), family.prompt(), **given).args[0]


def learned(model: Any, family: Transformer, layers: str = "decoder", iterations: int = 1) -> Any:
    """What Tune KV learns of a picture at one step."""
    given = counting.widgets(TuneKV, layers=layers, rank=counting.RANK, inner_steps=iterations, keep_source=False,
                             tolerance=0.0, guidance=family.guidance)  # fmt: skip
    prompt = family.prompt()
    return TuneKV.execute(model, trajectory(model, family), prompt, negative=prompt, **given).args[0]


def recomputed(model: Any, family: Transformer) -> Any:
    """The model behind Apply KV with what was learned in the last third of the blocks."""
    given = counting.widgets(ApplyKV, mode="recompute", source_guidance=1.0, start_percent=0.0)
    return ApplyKV.execute(model, learned(model, family), **given).args[0]


def applied(model: Any, family: Transformer, mode: str = "extend", layers: str = "decoder") -> Any:
    """The model behind Apply KV with what was recorded in some layers."""
    given = counting.widgets(ApplyKV, mode=mode, source_guidance=1.0, start_percent=0.0)
    return ApplyKV.execute(model, recorded(model, family, layers), **given).args[0]


Patched = Callable[[Any, Transformer], Any]
STEPS: dict[str, tuple[Patched, float | None]] = {  # how a model is patched, and the goal, by what is counted
    "Cross-Attention Mask, renormalised, half hidden": (
        lambda model, family: masked(model, family, mode="after softmax, renormalised"), 1.05),
    "the same, hidden from text and refiner too": (
        lambda model, family: masked(model, family, mode="after softmax, renormalised", hide_from_text=True,
                                     hide_from_refiner=True), 1.05),
    "Cross-Attention Mask, after softmax, half hidden": (
        lambda model, family: masked(model, family, mode="after softmax"), 1.05),
    "Attention Map, 1 word, all layers": (lambda model, family: watched(model, family, 1), 1.10),
    "Attention Map, 4 words, all layers": (lambda model, family: watched(model, family, 4), 1.10),
    "Attention Map, 4 words, decoder": (lambda model, family: watched(model, family, 4, layers="decoder"), 1.10),
    "Apply KV, extend, decoder": (applied, 1.10),
    "Apply KV, frozen, decoder": (lambda model, family: applied(model, family, "frozen"), 1.10),
    "Apply KV, recompute, decoder": (recomputed, 1.10),
    "Apply KV, extend, all layers": (lambda model, family: applied(model, family, layers="all"), None),
}  # fmt: skip
BESIDE, PASS, PLAIN = "Apply KV, extend, decoder, source beside the step", "a pass that records", "plain step"
ITERATION = "an iteration of Tune KV, decoder"


def step(model: Any, family: Transformer, patched: Patched | None = None, beside: bool = False) -> Cost:
    """A step that is not the first one, with the family's guidance; beside: the first one, no record fits in memory."""
    with torch.inference_mode(), host_without_values(0 if beside else MANY) as answers:
        model = model if patched is None else patched(model, family)
        count = (counting.CountCall if beside else CountSecondCall)(model.model, answers)
        prompt, levels = family.prompt(), torch.tensor((1.0, 0.0))
        prompts = {"positive": prompt, "negative": prompt, "guidance": family.guidance}
        host_sampling.sample(model, count, family.latent(), sigmas=levels, **prompts)
    return count.cost


def record(model: Any, family: Transformer, layers: str) -> tuple[Cost, int]:
    """(what recording one step costs, the bytes that are kept of it)."""
    with torch.inference_mode(), host_without_values(), counting.counting(model.model) as counter:
        kv = recorded(model, family, layers)
    return counter.cost, kv.source.bytes


def tuning(model: Any, family: Transformer, iterations: int) -> tuple[Cost, int]:
    """(what learning one step in so many iterations costs, the bytes that are kept of it)."""
    with torch.inference_mode(), host_without_values(), counting.counting(model.model) as counter:
        kv = learned(model, family, iterations=iterations)
    return counter.cost, kv.learned.bytes


def count(family: Transformer) -> tuple[dict[str, Cost], dict[str, int]]:
    """(what calls cost, bytes of a step by what is kept of it)."""
    model = build(family)
    costs = {PLAIN: step(model, family)}
    costs |= {name: step(model, family, patched) for name, (patched, _) in STEPS.items()}
    costs[BESIDE] = step(model, family, applied, beside=True)
    costs[PASS], decoder = record(model, family, "decoder")
    (one, size), (two, _) = (tuning(model, family, iterations) for iterations in (1, 2))
    costs[ITERATION] = two - one
    sizes = {"recorded, decoder": decoder, "recorded, all": record(model, family, "all")[1]}
    return costs, sizes | {f"learned, decoder, rank {counting.RANK}": size}
