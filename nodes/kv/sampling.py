"""KV Inversion, stage 3, inside the host: sampling with self-attention that looks at a tuned picture."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.kv_inversion import content_preserving_folded, source_guidance
from .. import host
from ..host.areas import Area, NoteAreas
from ..host.streaming import PieceStream
from .embeddings import LEARNED, SOURCE, KVEmbeddings, LayerEmbeddings, TunedLayer
from .tuning import placed

# ---- the ways in which a layer may look at the source ---------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What one layer is shown of P pictures at one step: keys and values (P, M, C).

    own_key, own_value (P, N or 1, 1): in mode recompute the weights of the edit's own K, V. bias (P, M): added to the
    scores of these keys, where the pictures' masks leave different tokens.
    """

    key: Tensor
    value: Tensor
    own_key: Tensor | None = None
    own_value: Tensor | None = None
    bias: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Shown:
        """The same with every tensor changed."""
        return Shown(**{name: None if t is None else change(t) for name, t in vars(self).items()})


def recompute(learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
    """For K_bar, V_bar from the edited picture's own K, V and the learned ones (eq. 1; Algorithm 1, stage 3).

    gamma, and the mask m on the tokens, are folded into K_hat here, once a step (content_preserving_folded).
    """
    m = None if mask is None else mask[..., None].to(learned.k_hat)

    def own(weight: Tensor) -> Tensor:
        return weight if m is None else 1 + m * (weight - 1)

    return Shown(
        product(learned.k_hat, learned.gamma_k, m),
        product(learned.v_hat, learned.gamma_v, m),
        own(learned.lambda_k),
        own(learned.lambda_v),
    )


def product(tensor: Tensor, *weights: Tensor | None) -> Tensor:
    """A tensor times the weights that are given; None is 1, without a pass over memory."""
    for weight in weights:
        tensor = tensor if weight is None else tensor * weight
    return tensor


def frozen(learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
    """K_bar, V_bar as they were when the source was rebuilt ("use the learned K_bar, V_bar of the tuning stage")."""
    return visible(
        content_preserving_folded(learned.k_source, product(learned.k_hat, learned.gamma_k), learned.lambda_k),
        content_preserving_folded(learned.v_source, product(learned.v_hat, learned.gamma_v), learned.lambda_v),
        mask,
    )


def extend(learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
    """The source's own K, V, to stand behind the edit's: every query may look at both pictures.

    They are what the untouched network computes on the exact path, without K_hat, V_hat: those mend the source's own
    errors token by token, and mean nothing at another pose.
    """
    return visible(learned.k_source, learned.v_source, mask)


def visible(key: Tensor, value: Tensor, mask: Tensor | None) -> Shown:
    """Only the tokens of which at least half is white, or the whitest one if there is none.

    Pictures that leave the same tokens simply have fewer keys; else the hidden ones get a bias of minus infinity.
    """
    if mask is None:
        return Shown(key, value)
    seen = (mask >= 0.5) | (mask == mask.amax(1, keepdim=True))
    if len(seen) == 1 or bool((seen == seen[:1]).all()):
        tokens = seen[0].nonzero()[:, 0]
        return Shown(key[:, tokens], value[:, tokens])
    return Shown(key, value, bias=torch.zeros_like(key[..., 0]).masked_fill(~seen, -math.inf))


MODES = {"extend": extend, "recompute": recompute, "frozen": frozen}
NEEDS = {extend: (SOURCE,), recompute: (LEARNED,), frozen: (LEARNED, SOURCE)}


@dataclass(frozen=True)
class Source:
    """One Apply KV: on which layers and how the source is looked at, how much, and where in the edited picture."""

    name: str
    layers: Mapping[tuple, TunedLayer]
    mode: Callable[[LayerEmbeddings, Tensor | None], Shown]
    strength: float
    mask: Tensor | None


class Tokens:
    """Keys and values that a layer's queries look at, put together from several sources."""

    def __init__(self, key: Tensor, value: Tensor):
        self.own, self.replaced = (key, value), False
        self.added: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def show(self, source: Source, shown: Shown) -> None:
        """Add a source. Raises ValueError where tokens would be mixed that do not correspond."""
        key, value = self.own
        if source.mode is recompute:
            if shown.key.shape[1] != key.shape[1]:
                raise ValueError(
                    f"mode recompute learned {shown.key.shape[1]} tokens for a layer that has {key.shape[1]} here: "
                    "another node changes the layer's size (a downscale patch?): take it out, or choose mode extend."
                )
            blended = (
                content_preserving_folded(key, shown.key, shown.own_key),
                content_preserving_folded(value, shown.value, shown.own_value),
            )
            self.own = tuple(mix(a, b, source.strength) for a, b in zip(self.own, blended, strict=True))
            return
        k_bar, v_bar = (t.expand(len(key), -1, -1) for t in (shown.key, shown.value))
        bias = shown.bias
        if source.mode is frozen:
            self.replaced = True
            if source.strength != 1.0 and k_bar.shape != key.shape:
                raise ValueError(
                    f"mode frozen at strength {source.strength:g} needs the tuned size and no source_mask: set "
                    "strength to 1, or take mode extend."
                )
            k_bar, v_bar = mix(key, k_bar, source.strength), mix(value, v_bar, source.strength)
        elif source.strength != 1.0:
            weight = key.new_full((1, k_bar.shape[1]), math.log(source.strength))
            bias = weight if bias is None else bias + weight
        self.added.append((k_bar, v_bar, bias))

    def joined(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values, bias on the scores or None) for a query (R, N, C); bias (N, M), or (R, N, M) if rows differ.

        Where another node tiles the queries (more rows than keys), the layer's own keys are split as the host splits
        them, and every tile looks at the whole source.
        """
        rows, queries = query.shape[:2]
        tiles = rows // len(self.own[0])
        own = tuple(t.reshape(rows, -1, t.shape[-1]) if tiles > 1 else t for t in self.own)
        added = [tuple(t if t is None or len(t) == 1 or tiles == 1 else t.repeat_interleave(tiles, 0) for t in part)
                 for part in self.added]  # fmt: skip
        parts = added if self.replaced else [(*own, None), *added]
        if len(parts) == 1 and parts[0][2] is None:
            return parts[0]
        key, value = (torch.cat([part[i].expand(rows, -1, -1) for part in parts], 1) for i in range(2))
        if all(part[2] is None for part in parts):
            return key, value, None
        differ = rows if max(len(part[2]) for part in parts if part[2] is not None) > 1 else 1
        biases = [
            key.new_zeros(differ, part[0].shape[1]) if part[2] is None else part[2].expand(differ, -1) for part in parts
        ]
        bias = torch.cat(biases, 1)[:, None].expand(-1, queries, -1)
        return key, value, bias if differ > 1 else bias[0]


def mix(own: Tensor, other: Tensor, strength: float) -> Tensor:
    """The share `strength` of the way from the edit's own tensor to the other."""
    return other if strength == 1.0 else torch.lerp(own, other, strength)


@dataclass(frozen=True)
class SourceAttention:
    """attn1 replacement while sampling, in cond and uncond rows alike (eq. 2); every Apply KV adds one source to it.

    Sources without a mask are looked at together. One with a mask (pictures, h, w) blends what its queries found there
    into the output: m Attn(Q, K_bar, V_bar) + (1 - m) rest. Disjoint masks do not touch each other.
    """

    sources: tuple[Source, ...]
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_) -> Tensor:
        layer = host.layer_key(options)
        now = [(source, options.get(source.name)) for source in self.sources]
        active = [(source, step) for source, step in now if step is not None and layer in step.layers]
        out = self.attend(query, key, value, options, [pair for pair in active if pair[0].mask is None])
        for source, step in active:
            if source.mask is not None:
                edited = self.attend(query, key, value, options, [(source, step)])
                out = torch.lerp(out, edited, step.mask_rows(source.mask, options, out))
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict, active: list[tuple[Source, CurrentStep]]
    ) -> Tensor:
        """The layer's attention with some sources in view."""
        if not active:
            return host.run_attention(options, self.previous, query, key, value)
        tokens = Tokens(key, value)
        for source, step in active:
            tokens.show(source, step.rows(source, options, len(key)))
        key, value, bias = tokens.joined(query)
        return host.run_attention(options, self.previous, query, key, value, bias)


# ---- one sampling run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurrentStep:
    """What SelectStep leaves in the options of one model call for the layers to read."""

    layers: dict[tuple, Shown]
    areas: tuple[Area | None, ...] | None = None
    grids: dict[tuple, Tensor] = field(default_factory=dict)

    def rows(self, source: Source, options: dict, rows: int) -> Shown:
        """What a layer is shown, for all rows of the call; one picture is broadcast where it can be."""
        name = host.layer_key(options)
        shown, layer = self.layers[name], source.layers[name]
        chunks, _ = host.chunk_rows(options, rows)
        if self.areas is not None and source.mode is recompute:
            grid = tuple(options["activations_shape"][-2:])
            whole = torch.arange(layer.tokens)
            tuned = layer.height, layer.width
            places = [(whole if a is None else a.tokens(tuned, *grid)).to(shown.key.device) for a in self.areas]

            def cropped(tensor: Tensor) -> Tensor:
                tensor = tensor.expand(rows // chunks, -1, -1)
                return torch.cat([tensor[:, p] if tensor.shape[1] > 1 else tensor for p in places])

            return shown.map(cropped)
        return shown if len(shown.key) == 1 or chunks == 1 else shown.map(
            lambda t: t.repeat(chunks, *(1,) * (t.ndim - 1))
        )  # fmt: skip

    def mask_rows(self, mask: Tensor, options: dict, like: Tensor) -> Tensor:
        """A mask's weight of every query of `like` (rows, N, C), (rows, N, 1), cropped as each prompt's area is."""
        chunks, pictures = host.chunk_rows(options, len(like))
        height, width = options["activations_shape"][-2:]
        name = ("mask", height, width, len(like), like.dtype, self.areas)
        if height * width != like.shape[1]:
            raise ValueError(
                f"a mask of Apply KV cannot find its place: a layer of {width} x {height} tokens asks for "
                f"{like.shape[1]} here because another node merges or tiles tokens (ToMe, HyperTile): take it out, or "
                "leave the mask off."
            )
        if name in self.grids:
            return self.grids[name]
        parts = [
            host.picture_rows(mask if area is None else area.crop(mask), pictures, height, width)
            for area in self.areas or (None,)
        ]
        weights = torch.cat(parts if self.areas else parts * chunks)
        self.grids[name] = weights.flatten(1)[..., None].to(like)
        return self.grids[name]


class RunCache:
    """What one sampling run keeps: the step in use, the pieces on their way, the masks on the layers' grids."""

    def __init__(self) -> None:
        self.step: tuple | None = None
        self.value: dict[tuple, Shown] | None = None
        self.stream = PieceStream()
        self.grids: dict[tuple, Tensor] = {}


@dataclass(frozen=True)
class StartRun:
    """OUTER_SAMPLE wrapper: a fresh cache for every sampling run, gone when the run ends."""

    name: str

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        options[self.name + ".run"] = RunCache()
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(self.name + ".run", None)


@dataclass(frozen=True)
class SelectStep:
    """APPLY_MODEL wrapper: once per model call, fetch the embeddings tuned nearest to the current noise level."""

    name: str
    kv: KVEmbeddings
    mode: Callable[[LayerEmbeddings, Tensor | None], Shown]
    layers: frozenset[tuple]
    sigma_start: float
    sigma_end: float
    look_ahead: float = 0.0
    source_mask: Tensor | None = field(default=None, compare=False)

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        if not options.get(self.name + ".hidden") and self.active(sigma := float(t.flatten()[0])):
            noted = options.get(self.name + ".areas")
            areas = tuple(noted.get(name) for name in options["uuids"]) if noted else None
            areas = areas if areas and any(areas) else None
            self.check(x, options, areas)
            cache = options.get(self.name + ".run") or RunCache()
            shown = self.fetch(sigma, executor.class_obj, x.device, cache)
            options[self.name] = None if shown is None else CurrentStep(shown, areas, cache.grids)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def active(self, sigma: float) -> bool:
        """Whether the embeddings act at this noise level."""
        return self.sigma_end < sigma <= self.sigma_start

    def check(self, x: Tensor, options: dict, areas: tuple | None) -> None:
        """Refuse a batch, or in mode recompute a picture size, that the embeddings were not tuned to."""
        _, pictures = host.chunk_rows(options, x.shape[0])
        if self.kv.pictures not in (1, pictures):
            raise ValueError(
                f"these KV embeddings were tuned to {self.kv.pictures} pictures, the sampled batch has {pictures}: "
                f"sample {self.kv.pictures} at a time, or tune to a single picture to use it for any batch."
            )
        size = next((area.whole for area in areas or () if area), tuple(x.shape[-2:]))
        if self.mode is recompute and size != self.kv.latent[1:]:
            raise ValueError(
                f"these KV embeddings were tuned to a latent of {self.kv.latent[2]} x {self.kv.latent[1]}, sampling "
                f"runs at {size[1]} x {size[0]} (8 pixels each): resize the picture to the tuned size, tune again, or "
                "take mode extend, which serves any size."
            )

    def fetch(self, sigma: float, base_model: Any, device: torch.device, cache: RunCache) -> dict[tuple, Shown] | None:
        """What the layers are shown at this step, reused while the step stays the same."""
        dtype = getattr(base_model, "get_dtype_inference", base_model.get_dtype)()
        wanted = (self.kv.at(sigma), device, dtype)
        if cache.step != wanted:
            modules = host.self_attention_modules(base_model.diffusion_model)
            cache.step, cache.value = wanted, self.prepare(*wanted, cache, modules)
        return cache.value

    def prepare(
        self, index: int, device: torch.device, dtype: torch.dtype, cache: RunCache, modules: dict
    ) -> dict[tuple, Shown] | None:
        """Move one step's pieces to the device, start on those of the next, and work out what the layers are shown."""
        parts = NEEDS[self.mode]
        later = self.kv.ahead(index, self.look_ahead) if SOURCE in parts else index
        pieces = self.kv.pieces(index, parts) | self.kv.pieces(later, parts)
        coming = self.kv.pieces(index + 1, parts) | self.kv.pieces(min(later + 1, len(self.kv.learned) - 1), parts)
        moved = cache.stream.fetch(pieces, coming, device)
        layers = self.kv.step(index, moved, device, dtype)
        if layers is None:
            return None
        if later != index:
            source = self.kv.step(later, moved, device, dtype) or layers
            layers = {key: replace(layer, source=source[key].source) for key, layer in layers.items()}
        shown = {}
        for layer in (layer for layer in self.kv.layers if layer.key in self.layers):
            found = layers[layer.key].projected(modules[layer.key].to_k, modules[layer.key].to_v)
            shown[layer.key] = self.mode(found, self.source_tokens(layer.height, layer.width, device, cache))
        return shown

    def source_tokens(self, height: int, width: int, device: torch.device, cache: RunCache) -> Tensor | None:
        """The source's mask on a layer's tokens, (pictures or 1, N)."""
        if self.source_mask is None:
            return None
        name = ("source_mask", height, width)
        if name not in cache.grids:
            pictures = self.kv.pictures if len(self.source_mask) > 1 else 1
            grid = host.picture_rows(self.source_mask, pictures, height, width, "source_mask")
            cache.grids[name] = grid.flatten(1).to(device)
        return cache.grids[name]


@dataclass(frozen=True)
class SourceGuidance:
    """Post-CFG function: one more model row a step, with the source hidden, and a push away from what it draws."""

    select: SelectStep
    scale: float

    def __call__(self, args: dict) -> Tensor:
        import comfy.samplers

        guided, sigma = args["denoised"], args["sigma"]
        if not self.select.active(float(sigma.flatten()[0])):
            return guided
        without_text = args.get("uncond_denoised") is not None and args.get("uncond") is not None
        prompt = args["uncond"] if without_text else args["cond"]  # guidance 1 runs without the negative prompt
        shown = args["uncond_denoised"] if without_text else args["cond_denoised"]
        model_options = args["model_options"].copy()
        hidden_source = {self.select.name + ".hidden": True}
        model_options["transformer_options"] = model_options.get("transformer_options", {}) | hidden_source
        (hidden,) = comfy.samplers.calc_cond_batch(args["model"], [prompt], args["input"], sigma, model_options)
        return source_guidance(guided, shown, hidden, self.scale)


def apply(
    model: Any,
    kv: KVEmbeddings,
    mode: str,
    strength: float,
    start_percent: float,
    end_percent: float,
    placement: str,
    mask: Tensor | None,
    look_ahead: float = 0.0,
    guidance: float = 1.0,
    source_mask: Tensor | None = None,
) -> Any:
    """A clone of the model that attends to the tuned keys and values. At strength 0 it is the model, bit for bit.

    mask: where in the edited picture the source acts; source_mask: which part of the source may be looked at.
    Raises ValueError if the model's layers are not those the embeddings were tuned in, or an input is not usable.
    """
    from comfy.patcher_extension import WrappersMP

    present = {layer.key: layer for layer in host.self_attention_layers(model, "KV Inversion")}
    for layer in kv.layers:
        if layer.key not in present or present[layer.key].channels != layer.channels:
            raise ValueError(
                f"these KV embeddings were tuned on another architecture: they hold {layer.channels} channels for "
                f"layer {layer.block} {layer.number}.{layer.index}, which this model "
                + (f"has with {present[layer.key].channels}." if layer.key in present else "does not have.")
                + " Load the checkpoint family they were tuned on (SD 1.5 or SDXL), or tune again."
            )
    if SOURCE in NEEDS[MODES[mode]] and not kv.keeps_source:
        raise ValueError(f"mode {mode!r} needs the source's own keys and values: tune again with keep_source on.")
    patched = model.clone()
    if strength == 0.0:
        return patched
    sampling = model.get_model_object("model_sampling")
    name = f"palimpsest_kv.{uuid.uuid4().hex}"
    layers = {layer.key: layer for layer in placed(list(kv.layers), placement)}
    source = Source(name, layers, MODES[mode], strength, mask)

    def attention(earlier: Any) -> SourceAttention:
        ours = earlier if isinstance(earlier, SourceAttention) else SourceAttention((), earlier)
        return replace(ours, sources=(*ours.sources, source))

    host.replace_attention(patched, "attn1", list(layers.values()), attention, longer=MODES[mode] is extend)
    window = (sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent))
    select = SelectStep(name, kv, MODES[mode], frozenset(layers), *window, look_ahead, source_mask)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, name, StartRun(name))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, name, NoteAreas(name))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, name, select)
    if guidance != 1.0:
        patched.set_model_sampler_post_cfg_function(SourceGuidance(select, guidance))
    return patched
