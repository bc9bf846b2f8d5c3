"""KV Inversion, stage 3, inside the host: sampling with self-attention that looks at a tuned picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.kv_inversion import source_guidance
from .. import host
from ..host.streaming import PieceStream
from .embeddings import LEARNED, SOURCE, KVEmbeddings, LayerEmbeddings, TunedLayer
from .joint import HIDDEN, JointSource, apply_joint
from .modes import MODES, RECOMPUTE, Mode, Shown, served
from .recorded import RecordedKV
from .settings import ApplySettings, chosen_layers
from .tokens import Tokens

TECHNIQUE = "KV Inversion"


@dataclass(frozen=True, eq=False)
class Source:
    """One Apply KV: what is looked at, how, how much, when, on which layers, and where in the edited picture.

    look_ahead: how much later in its own sampling it is shown, as a share of the schedule. mask: where in the edited
    picture it acts; source_mask: which part of it may be looked at; both None for all.
    """

    kv: KVEmbeddings
    layers: Mapping[host.LayerKey, TunedLayer]
    mode: Mode
    window: host.Window
    strength: float = 1.0
    look_ahead: float = 0.0
    mask: Tensor | None = None
    source_mask: Tensor | None = None
    remarks: host.Remarks = host.UNHEARD

    def acts_in(self, options: dict) -> bool:
        """Whether it is looked at in the model call that a layer runs in: in none of another node's source."""
        call = host.call_of(options)
        if call is None or host.in_source_pass(options):
            return False
        return options.get(HIDDEN) is not self and call.within(self.window)

    def now(self, options: dict, device: torch.device) -> CurrentStep | None:
        """What is looked at in this model call, worked out for the first layer that asks; None outside the span."""
        call = host.call_of(options)
        return call.kept(self, lambda: self.current_step(call, device))

    def current_step(self, call: host.ModelCall, device: torch.device) -> CurrentStep | None:
        """What the layers are shown at the call's noise level. Raises ValueError where it does not fit the call."""
        self.check(call)
        kept = call.run.kept(self, KeptOfARun)
        shown = self.fetch(call, device, kept)
        areas = call.areas if call.has_areas else None
        return None if shown is None else CurrentStep(shown, areas, kept.grids, call.frames, self.remarks)

    def check(self, call: host.ModelCall) -> None:
        """Refuse a batch, or where tokens correspond a picture size, that the embeddings were not tuned to."""
        kv = self.kv
        if kv.pictures not in (1, call.clip):
            raise ValueError(
                f"these KV embeddings were tuned to {kv.pictures} pictures, the sampled batch has {call.clip}: "
                f"sample {kv.pictures} at a time, or tune to a single picture to use it for any batch."
            )
        size = next((area.whole for area in call.areas if area), call.latent)
        if self.mode.corresponds and size != kv.latent[1:]:
            raise ValueError(
                f"these KV embeddings were tuned to a latent of {kv.latent[2]} x {kv.latent[1]}, sampling runs at "
                f"{size[1]} x {size[0]} (8 pixels each): resize the picture to the tuned size, tune again, or take "
                "mode extend, which serves any size."
            )

    def fetch(self, call: host.ModelCall, device: torch.device, kept: KeptOfARun) -> dict[tuple, Shown] | None:
        """What the layers are shown at this step, reused while the step stays the same."""
        dtype = getattr(call.model, "get_dtype_inference", call.model.get_dtype)()
        wanted = (self.kv.at(call.sigma), device, dtype)
        if kept.step != wanted:
            modules = host.self_attention_modules(call.model.diffusion_model)
            kept.step, kept.shown = wanted, self.prepare(*wanted, kept, modules)
        return kept.shown

    def prepare(
        self, index: int, device: torch.device, dtype: torch.dtype, kept: KeptOfARun, modules: dict
    ) -> dict[tuple, Shown] | None:
        """Move one step's pieces to the device, start on those of the next, and work out what the layers are shown."""
        later = self.kv.ahead(index, self.look_ahead) if SOURCE in self.mode.needs else index
        moved = kept.stream.fetch(self.pieces(index, later), self.pieces(index + 1, later + 1), device)
        layers = self.kv.step(index, moved, device, dtype)
        if layers is None:
            return None
        if later != index:
            source = self.kv.step(later, moved, device, dtype) or layers
            layers = {key: replace(layer, source=source[key].source) for key, layer in layers.items()}
        return {key: self.shown(layer, layers[key], modules[key], kept) for key, layer in self.layers.items()}

    def pieces(self, index: int, later: int) -> dict[tuple[str, int], Tensor]:
        """The tensors that steps `index` and `later` need; past the last step, `later` is the last."""
        parts, last = self.mode.needs, len(self.kv.learned) - 1
        return self.kv.pieces(index, parts) | self.kv.pieces(min(later, last), parts)

    def shown(self, layer: TunedLayer, found: LayerEmbeddings, module: Any, kept: KeptOfARun) -> Shown:
        """What one layer is shown: the source's tokens through the layer's own to_k and to_v."""
        found = found.projected(module.to_k, module.to_v)
        return self.mode.shown(found, self.visible_tokens(layer, found.lambda_k.device, kept))

    def visible_tokens(self, layer: TunedLayer, device: torch.device, kept: KeptOfARun) -> Tensor | None:
        """The source's mask on a layer's tokens, (pictures or 1, N)."""
        if self.source_mask is None:
            return None
        size = layer.height, layer.width
        if size not in kept.grids:
            pictures = self.kv.pictures if len(self.source_mask) > 1 else 1
            mask = host.as_encoded(self.source_mask, self.kv.latent[1:])
            grid = host.picture_rows(mask, pictures, *size, "source_mask")
            kept.grids[size] = grid.flatten(1).to(device)
        return kept.grids[size]


class KeptOfARun:
    """What one sampling run keeps of a source: the step in use, the pieces on their way, the masks on layers' grids."""

    def __init__(self) -> None:
        self.step: tuple | None = None
        self.shown: dict[tuple, Shown] | None = None
        self.stream = PieceStream()
        self.grids: dict[tuple, Tensor] = {}


@dataclass(frozen=True)
class CurrentStep:
    """What the layers are shown in one model call. areas: of its prompts, None where none is limited to one.

    layers: of all pictures; frames: which of them are in the call.
    """

    layers: dict[tuple, Shown]
    areas: tuple[host.Area | None, ...] | None = None
    grids: dict[tuple, Tensor] = field(default_factory=dict)
    frames: host.Frames = host.EVERY
    remarks: host.Remarks = host.UNHEARD

    def rows(self, source: Source, options: dict, rows: int) -> Shown:
        """What a layer is shown, for all rows of the call; one picture is broadcast where it can be."""
        shown, layer = self.layers[host.layer_key(options)], source.layers[host.layer_key(options)]
        chunks, pictures = host.chunk_rows(options, rows)
        if self.frames.shown is not None:
            shown = shown.map(self.frames.rows)
        if self.areas is not None and source.mode.corresponds:
            return self.cropped(shown, layer, tuple(options["activations_shape"][-2:]), pictures)
        alike = len(shown.key) == 1 or chunks == 1
        return shown if alike else shown.map(lambda t: t.repeat(chunks, *(1,) * (t.ndim - 1)))

    def cropped(self, shown: Shown, layer: TunedLayer, grid: host.Grid, pictures: int) -> Shown:
        """The tokens that each prompt's area covers, for the rows of a call whose layer has this grid."""
        whole, tuned = torch.arange(layer.tokens), (layer.height, layer.width)
        positions = [(whole if area is None else area.tokens(tuned, *grid)) for area in self.areas]
        positions = [chosen.to(shown.key.device) for chosen in positions]

        def crop(tensor: Tensor) -> Tensor:
            tensor = tensor.expand(pictures, -1, -1)
            return torch.cat([tensor[:, chosen] if tensor.shape[1] > 1 else tensor for chosen in positions])

        return shown.map(crop)

    def mask_rows(self, mask: Tensor, options: dict, like: Tensor) -> Tensor:
        """A mask's weight of every query of `like` (rows, N, C), (rows, N, 1), cropped as each prompt's area is."""
        height, width = options["activations_shape"][-2:]
        if height * width != like.shape[1]:
            raise ValueError(
                f"a mask of Apply KV cannot find its place: a layer of {width} x {height} tokens asks for "
                f"{like.shape[1]} here because another node merges or tiles tokens (ToMe, HyperTile): take it out, or "
                "leave the mask off."
            )
        name = ("mask", height, width, len(like), like.dtype, self.areas, self.frames if len(mask) > 1 else None)
        if name not in self.grids:
            chunks, pictures = host.chunk_rows(options, len(like))
            mask = mask.reshape(-1, *mask.shape[-2:])
            whole = next((area.whole for area in self.areas or () if area), host.call_of(options).latent)
            if unlike := host.stretched(mask, whole):
                self.remarks.say_once(host.call_of(options).run, unlike)
            mask = host.as_encoded(mask, whole)
            parts = [
                host.rows_of_frames(mask if area is None else area.crop(mask), self.frames, pictures, height, width)
                for area in self.areas or (None,)
            ]
            weights = torch.cat(parts if self.areas else parts * chunks)
            self.grids[name] = weights.flatten(1)[..., None].to(like)
        return self.grids[name]


@dataclass(frozen=True)
class SourceAttention:
    """attn1 replacement while sampling, in cond and uncond rows alike (eq. 2); every Apply KV adds one source to it.

    Sources without a mask are looked at together. One with a mask (pictures, h, w) blends what its queries found there
    into the output: m Attn(Q, K_bar, V_bar) + (1 - m) rest. Disjoint masks do not touch each other.
    """

    sources: tuple[Source, ...]
    previous: Any = None

    @host.not_compiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        layer = host.layer_key(options)
        acting = [source for source in self.sources if layer in source.layers and source.acts_in(options)]
        steps = [(source, source.now(options, query.device)) for source in acting]
        active = [(source, step) for source, step in steps if step is not None]
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
            source.mode.act(tokens, step.rows(source, options, len(key)), source.strength)
        key, value, bias = tokens.joined(query)
        return host.run_attention(options, self.previous, query, key, value, bias)


@dataclass(frozen=True)
class SourceGuidance:
    """Post-CFG function: one more model row a step, with the source hidden, and a push away from what it draws."""

    source: Source | JointSource
    scale: float

    def __call__(self, args: dict) -> Tensor:
        import comfy.samplers

        guided, sigma, window = args["denoised"], args["sigma"], self.source.window
        options = args["model_options"].get("transformer_options", {})
        within = window.always or float(sigma.flatten()[0]) in window
        if host.in_source_pass(options) or not within:
            return guided
        without_text = args.get("uncond_denoised") is not None and args.get("uncond") is not None
        prompt = args["uncond"] if without_text else args["cond"]  # guidance 1 runs without the negative prompt
        shown = args["uncond_denoised"] if without_text else args["cond_denoised"]
        prompt = host.with_own_adapters(prompt, args["model_options"])
        own = args["model_options"] | {"transformer_options": options | {HIDDEN: self.source}}
        model_options = host.every_step_runs(own)
        (hidden,) = comfy.samplers.calc_cond_batch(args["model"], [prompt], args["input"], sigma, model_options)
        return source_guidance(guided, shown, hidden, self.scale)


def apply(
    model: Any,
    kv: KVEmbeddings | RecordedKV,
    settings: ApplySettings,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    remarks: host.Remarks | None = None,
) -> Any:
    """A clone of the model that attends to the tuned keys and values. At strength 0 it is the model, bit for bit.

    mask: where in the edited picture the source acts; source_mask: which part of the source may be looked at. remarks
    hear of sampling runs that do not go the tuning's way.
    Raises ValueError if the model's layers are not those the embeddings were tuned in, or an input is not usable.
    """
    if isinstance(kv, RecordedKV):
        require_masks(kv, mask, source_mask)
        patched, source = apply_joint(model, kv, settings, mask, source_mask, remarks)
        return with_guidance(patched, source, settings)
    mode = MODES[settings.mode]
    window = host.Window.of(model, settings.start_percent, settings.end_percent)
    require_masks(kv, mask, source_mask)
    require_layers(model, kv)
    require_mode(kv, settings.mode)
    patched = model.clone()
    if settings.strength == 0.0:
        return patched
    layers = {layer.key: layer for layer in chosen_layers(list(kv.layers), settings.layers)}
    source = Source(
        kv=kv,
        layers=layers,
        mode=mode,
        window=window,
        strength=settings.strength,
        look_ahead=settings.look_ahead,
        mask=mask,
        source_mask=source_mask,
        remarks=remarks or host.UNHEARD,
    )
    if remarks is not None:
        host.compare_runs(patched, recorded(kv, whole=mask is None), remarks)
    install(patched, source)
    return with_guidance(patched, source, settings)


def with_guidance(patched: Any, source: Source | JointSource | None, settings: ApplySettings) -> Any:
    """A clone that also insists on the source's look, where that is set."""
    if source is not None and settings.source_guidance != 1.0:
        patched.set_model_sampler_post_cfg_function(SourceGuidance(source, settings.source_guidance))
    return patched


def recorded(kv: KVEmbeddings, whole: bool) -> host.Recorded:
    """How the picture was tuned. whole: its source acts everywhere; else other noise may lie beside the picture's."""
    return host.Recorded(
        how="tuned",
        sigmas=kv.sigmas,
        start=lambda model: model.process_latent_in(kv.noise),
        apart="each step takes what was learned at the nearest noise level",
        guidance=kv.guidance,
        from_start=whole,
    )


def how_to_sample(kv: KVEmbeddings | RecordedKV) -> str:
    """What the sampler should be told, in a line."""
    if isinstance(kv, RecordedKV):
        way = f"{kv.trajectory.steps} steps{cfg_of(kv.learned)}, euler"
        return "; ".join(filter(None, (kv.said, f"sample from inverted_noise: SamplerCustomAdvanced, {way}")))
    return f"sample from the picture's noise, add_noise disabled: {len(kv.sigmas) - 1} steps{cfg_of(kv)}, euler"


def cfg_of(kv: KVEmbeddings | None) -> str:
    """The guidance of a tuning, behind its steps."""
    return "" if kv is None or kv.guidance is None else f", cfg {kv.guidance:g}"


def burns_in(kv: KVEmbeddings | RecordedKV, settings: ApplySettings) -> str:
    """What source guidance makes of a mode that shows what was learned, in a line; "" where it does no harm."""
    learned = settings.mode == RECOMPUTE or (not isinstance(kv, RecordedKV) and LEARNED in MODES[settings.mode].needs)
    if not learned or settings.source_guidance == 1.0 or settings.strength == 0.0:
        return ""
    return f"source_guidance {settings.source_guidance:g} burns in what mode {settings.mode} shows: set it to 1"


def install(patched: Any, source: Source) -> None:
    """Let a clone's layers look at one source more."""

    def attention(earlier: Any) -> SourceAttention:
        ours = earlier if isinstance(earlier, SourceAttention) else SourceAttention((), earlier)
        return replace(ours, sources=(*ours.sources, source))

    host.observe(patched)
    host.replace_attention(patched, "attn1", list(source.layers.values()), attention, longer=source.mode.longer)


def require_layers(model: Any, kv: KVEmbeddings) -> None:
    """Raise ValueError where a tuned layer is not in the model, or has another width."""
    present = {layer.key: layer for layer in host.self_attention_layers(model, TECHNIQUE)}
    for layer in kv.layers:
        if layer.key not in present or present[layer.key].channels != layer.channels:
            raise ValueError(
                f"these KV embeddings were tuned on another architecture: they hold {layer.channels} channels for "
                f"layer {layer.block} {layer.number}.{layer.index}, which this model "
                + (f"has with {present[layer.key].channels}." if layer.key in present else "does not have.")
                + " Load the checkpoint family they were tuned on (SD 1.5 or SDXL), or tune again."
            )


def require_mode(kv: KVEmbeddings, mode: str) -> None:
    """Raise ValueError for a mode that reads what the embeddings do not hold."""
    if mode in served(kv):
        return
    if not kv.keeps_source:
        raise ValueError(f"mode {mode!r} needs the source's own keys and values: tune again with keep_source on.")
    raise ValueError(
        f"mode {mode!r} shows what was learned, and these KV embeddings were recorded without learning: take mode "
        f"{' or '.join(served(kv))}, or tune with inner_steps above 0."
    )


def require_masks(kv: KVEmbeddings | RecordedKV, mask: Tensor | None, source_mask: Tensor | None) -> None:
    """Raise ValueError for a mask that holds NaN or nothing, and for a source_mask that fits no picture or is black."""
    if mask is not None:
        host.picture_rows(mask, mask.reshape(-1, *mask.shape[-2:]).shape[0], 1, 1, "mask")
    if source_mask is not None:
        rows = host.picture_rows(source_mask, kv.pictures, 1, 1, "source_mask")
        if not bool((rows > 0).all()):
            raise ValueError("source_mask is black: nothing of the source could be looked at. Paint it white.")
