"""Feature blending inside the host: while an edit is sampled, the original's features and latents flow back into it.

The original's features come from a pass of its own through the same network, at the same noise level and with the
source's prompt: recorded once before sampling (feature_cache), or made beside every step. Reference rows appended to
the edit's batch would save nothing, and break ControlNets (whose output fits the edit's rows only) and every patch that
counts rows by cond_or_uncond; a pass of its own disturbs neither.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...kernels import feature_blend as maths
from ...kernels.ddim import rescale_to_level
from .. import host
from ..host.areas import Area, NoteAreas
from ..host.streaming import PieceStream
from .layers import AFTER_MIDDLE, MIDDLE, OUT, Feature, FeatureLayer

PREFIX = "palimpsest_feature_blend."
LEFT_OUT = ("control", "hooks", "gligen", "additional_models")  # of the source's prompt: they belong to the edit

Alpha = tuple[Tensor | float, Tensor | float]  # the edit's share inside and outside of the mask

# ---- the reference's latents ----------------------------------------------------------------------------------------


TRAJECTORY, RENOISED = "trajectory", "re-noised original"
REFERENCES: dict[str, Callable[[host.Trajectory, int], host.Trajectory]] = {
    TRAJECTORY: lambda trajectory, seed: trajectory,
    RENOISED: host.renoised,
}

# ---- what the patches do with a feature -----------------------------------------------------------------------------


class Recording:
    """In a pass of the reference: keep the wanted features."""

    def __init__(self, wanted: frozenset[Feature]):
        self.wanted, self.features = wanted, {}

    def meet(self, key: Feature, h: Tensor, options: dict) -> Tensor:
        """h (B, C, h, w) unchanged. Raises ValueError where the source's prompt is more than one."""
        if key in self.wanted:
            if len(options["cond_or_uncond"]) != 1:
                raise ValueError(
                    f"the source prompt has {len(options['cond_or_uncond'])} parts that act at once: connect one "
                    "prompt that describes the whole picture."
                )
            self.features[key] = h.detach().clone()  # others may change h in place
        return h


@dataclass(frozen=True)
class Blending:
    """In a pass of the edit: blend the reference's features in, in cond and uncond rows alike.

    features: the reference's, (B or 1, C, h, w). sources: which of them each blended feature is mixed with. mask
    (pictures, h, w) of any size; grids: the weights made from it. name: of the node among the options.
    """

    name: str
    features: Mapping[Feature, Tensor]
    sources: Mapping[Feature, Feature]
    alphas: Mapping[Feature, Alpha]
    mask: Tensor | None = None
    grids: dict[tuple, Tensor] = field(default_factory=dict)

    def meet(self, key: Feature, h: Tensor, options: dict) -> Tensor:
        """h (R, C, h, w), blended if this feature was chosen."""
        if key not in self.alphas:
            return h
        chunks, pictures = host.chunk_rows(options, len(h))
        reference = self.features[self.sources[key]]
        rows = h.unflatten(0, (chunks, pictures))
        places = self.places(options)
        reference = joined([crop(reference, place, h.shape[-2:]) for place in places])
        if reference.shape[2:] != rows.shape[2:]:
            raise ValueError(
                f"the reference's feature {' '.join(map(str, key))} is {tuple(reference.shape[2:])}, the edit's "
                f"{tuple(rows.shape[2:])}: another node resizes features in one of the two (a downscale patch?); put "
                "it before this node, or set features to 'same step'."
            )
        weights = [self.weight(key, place, pictures, h) for place in places]
        weight = weights[0] if self.mask is None else joined(weights)
        return maths.blend(rows, reference.to(h), weight).flatten(0, 1)

    def places(self, options: dict) -> tuple[Area | None, ...]:
        """One area for each chunk of rows, or one None for all of them."""
        noted = options.get(self.name + ".areas")
        found = tuple(noted.get(name) for name in options["uuids"]) if noted else ()
        return found if any(found) else (None,)

    def weight(self, key: Feature, place: Area | None, pictures: int, like: Tensor) -> Tensor | float:
        """The edit's share of a feature or of a crop of it, a number or (pictures, 1, h, w); made once a run."""
        if self.mask is None:
            return maths.blend_weight(None, *self.alphas[key])
        name = (key, place, pictures, like.shape[-2:], like.dtype, like.device)
        if name not in self.grids:
            mask = self.mask if place is None else place.crop(self.mask)
            small = host.picture_rows(mask, pictures, *like.shape[-2:])
            self.grids[name] = maths.blend_weight(small, *self.alphas[key]).to(like)
        return self.grids[name]


def joined(parts: list[Tensor]) -> Tensor:
    """One tensor for all chunks of rows, or one for each, with a dimension of chunks in front."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def crop(feature: Tensor, place: Area | None, size: tuple[int, int]) -> Tensor:
    """The part of a whole picture's feature (B, C, H, W) that a prompt's area of `size` features covers."""
    if place is None:
        return feature
    (height, width), (rows, columns) = feature.shape[-2:], size
    top = min(round(place.top * height / place.whole[0]), height - rows)
    left = min(round(place.left * width / place.whole[1]), width - columns)
    return feature[..., top : top + rows, left : left + columns]


@dataclass(frozen=True)
class AfterInputBlock:
    """input_block_patch_after_skip: the next block's input; the skip that has just been taken stays the edit's own."""

    name: str
    last: int

    def __call__(self, h: Tensor, options: dict) -> Tensor:
        step = options.get(self.name)
        number = options["block"][1]
        return h if step is None else step.meet(("input", number + 1) if number < self.last else MIDDLE, h, options)


@dataclass(frozen=True)
class BeforeOutputBlock:
    """output_block_patch: what the block before returned, before the skip is joined to it."""

    name: str

    def __call__(self, h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        step = options.get(self.name)
        return (h if step is None else step.meet(("output", options["block"][1]), h, options)), skip


OPTIONS: ContextVar[dict | None] = ContextVar("palimpsest_feature_blend", default=None)


def share_options(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """DIFFUSION_MODEL wrapper: the module behind the last block is given no options; it finds them here."""
    options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
    token = OPTIONS.set(options)
    try:
        return executor(*args, **kwargs)
    finally:
        OPTIONS.reset(token)


class BlendBeforeOut(nn.Sequential):
    """Stands for the U-Net's `out` around the same children, so that names of weights stay: blends its input first."""

    def __init__(self, previous: nn.Sequential, names: tuple[str, ...]):
        super().__init__(*previous)
        self.names = names

    def forward(self, h: Tensor) -> Tensor:
        options = OPTIONS.get() or {}
        for step in (options.get(name) for name in self.names):
            h = h if step is None else step.meet(OUT, h, options)
        return super().forward(h)


# ---- where the reference's features come from -----------------------------------------------------------------------


class Run:
    """What one sampling run keeps: its levels, the source's prompt as the model takes it, the step in use."""

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.prompt: list[dict] = []
        self.at: Any = None
        self.features: dict[Feature, Tensor] = {}
        self.grids: dict[tuple, Tensor] = {}
        self.stream = PieceStream()


@dataclass(frozen=True)
class Call:
    """One model call of a sampler, as a wrapper is given it."""

    guider: Any
    x: Tensor
    timestep: Tensor
    sigma: float
    model_options: dict
    run: Run

    def options_with(self, **more: Any) -> dict:
        """The call's model_options with entries of our own among the transformer_options."""
        return self.model_options | {"transformer_options": self.model_options.get("transformer_options", {}) | more}


class Features(Protocol):
    """Where a step's reference features come from."""

    def at(self, call: Call, blend: BlendFeatures) -> Mapping[Feature, Tensor]:
        """The features (B or 1, C, h, w) at the call's noise level, on its device."""

    def begin(self, guider: Any, run: Run, noise: Tensor, latent: Tensor, denoise_mask: Any, seed: Any) -> None:
        """Prepare for a sampling run."""


@dataclass(frozen=True)
class SameStep:
    """A pass of the reference before every step of the edit: one more row, no memory."""

    prompt: list

    def begin(self, guider: Any, run: Run, noise: Tensor, latent: Tensor, denoise_mask: Any, seed: Any) -> None:
        """Encode the source's prompt for the model; an inpaint or instruct model sees the edit's own pictures."""
        import comfy.sampler_helpers
        import comfy.samplers

        edits = next(iter(guider.conds.values()), [])
        edited = guider.conds.get("positive") or edits
        pictures = {key: value for key, value in (edited[0] if edited else {}).items() if key.startswith("concat_")}
        conds = {"positive": [pictures | cond for cond in comfy.sampler_helpers.convert_cond(source(self.prompt))]}
        comfy.samplers.process_conds(guider.inner_model, noise, conds, noise.device, latent, denoise_mask, seed)
        run.prompt = conds["positive"]

    def at(self, call: Call, blend: BlendFeatures) -> Mapping[Feature, Tensor]:
        """Run the reference; a sampler that asks twice at one level has it once."""
        import comfy.samplers

        run = call.run
        if run.at != call.sigma:
            recording = Recording(frozenset(blend.sources.values()))
            x = host.latents_at(blend.reference, call.sigma).to(call.x)
            model_options = call.options_with(**{blend.name: recording})
            others = model_options["transformer_options"]
            for name in [name for name in others if name.startswith(PREFIX) and name != blend.name]:
                del others[name]
            with torch.no_grad():
                level = call.timestep[:1].expand(len(x))
                comfy.samplers.calc_cond_batch(call.guider.inner_model, [run.prompt], x, level, model_options)
            if not recording.features:
                raise ValueError("the source prompt does not act at every step: connect it without a time range.")
            run.at, run.features = call.sigma, recording.features
        return run.features


def source(prompt: list) -> list:
    """The source's prompt without what belongs to the edit. Raises ValueError where it is limited to an area."""
    if any("area" in extra or extra.get("set_area_to_bounds") for _, extra in prompt):
        raise ValueError(
            "the source prompt describes the whole picture, this one is limited to an area: connect it without "
            "ConditioningSetArea, and masks with set_cond_area default."
        )
    return [[tensor, {key: value for key, value in extra.items() if key not in LEFT_OUT}] for tensor, extra in prompt]


# ---- one sampling run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartRun:
    """OUTER_SAMPLE wrapper: fresh state for every sampling run, gone when the run ends."""

    name: str

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        options[self.name + ".run"] = Run()
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(self.name + ".run", None)


@dataclass(frozen=True)
class BlendFeatures:
    """What is blended with what, and when. alphas and sources are keyed by the blended features.

    window: noise levels sigma_start >= sigma > sigma_end at which features are blended; pinned_above: the level above
    which the latent outside of the mask is the reference's. quirks: as PFB-Diff's code has it (PalimpsestFeatureBlend).
    """

    name: str
    reference: host.Trajectory
    features: Features
    alphas: Mapping[Feature, Alpha]
    sources: Mapping[Feature, Feature]
    window: tuple[float, float]
    pinned_above: float
    mask: Tensor | None = field(default=None, compare=False)
    quirks: bool = False

    def pinned(self, sigma: float) -> bool:
        """Whether the latent outside of the mask is the reference's at this noise level."""
        return self.mask is not None and sigma > self.pinned_above

    def active(self, sigma: float) -> bool:
        """Whether features are blended at this noise level."""
        return bool(self.alphas) and self.window[1] < sigma <= self.window[0]

    def latent_mask(self, x: Tensor, grids: dict[tuple, Tensor]) -> Tensor:
        """The mask on the latent's grid, (B, 1, H, W)."""
        name = ("latent", tuple(x.shape), x.device)
        if name not in grids:
            grids[name] = host.picture_rows(self.mask, len(x), *x.shape[-2:]).to(x)
        return grids[name]

    def target(self, sigma: float, sigma_next: float) -> Tensor:
        """The reference that a step from sigma arrives at outside of the mask."""
        if self.quirks:  # PFB-Diff's code blends with the level just left, as if it were the next
            return rescale_to_level(host.latents_at(self.reference, sigma), sigma, sigma_next)
        return host.latents_at(self.reference, sigma_next)


@dataclass(frozen=True)
class BeginSampling:
    """SAMPLER_SAMPLE wrapper: note the run's levels, prepare the reference, begin outside of the mask on its path."""

    blend: BlendFeatures

    def __call__(
        self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
        latent_image: Any = None, denoise_mask: Any = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        blend, run = self.blend, extra_args["model_options"]["transformer_options"][self.blend.name + ".run"]
        blend.reference.check_batch(noise)
        run.levels = sigmas.tolist()
        inverted = not bool(noise.any())
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        if blend.alphas:
            blend.features.begin(guider, run, noise, latent, denoise_mask, extra_args.get("seed"))
        if blend.quirks and inverted and len(run.levels) > 2:
            # PFB-Diff's code inverts up to t = 999 and samples from 981 on, with the latent as it is.
            latent_image = rescale_to_level(latent, *run.levels[:2])
            sigmas, run.levels = sigmas[1:], run.levels[1:]
        elif blend.pinned(run.levels[0]) and denoise_mask is None:  # that mask needs the picture itself
            mask = blend.latent_mask(noise, run.grids)
            latent_image = maths.blend(latent, host.latents_at(blend.reference, run.levels[0]).to(latent), mask)
            noise = noise * mask
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)


@dataclass(frozen=True)
class BlendStep:
    """PREDICT_NOISE wrapper: once per model call, fetch the reference's features and hold the latent outside.

    Outside of the mask the model is given the reference's latent and the sampler the x_0 with which an Euler step lands
    on the reference's next latent. The host's own inpainting mask acts around this, and wins where it is black.
    """

    blend: BlendFeatures

    def __call__(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None, **kwargs
    ) -> Tensor:
        blend, sigma = self.blend, float(timestep.flatten()[0])
        options = (model_options or {}).get("transformer_options", {})
        run = options[blend.name + ".run"]
        call = Call(executor.class_obj, x, timestep, sigma, model_options, run)
        pinned = blend.pinned(sigma)
        if pinned:
            mask = blend.latent_mask(x, run.grids)
            here = x if blend.quirks else host.latents_at(blend.reference, sigma).to(x)
            x = maths.blend(x, here, mask)
        if blend.active(sigma):
            features = blend.features.at(call, blend)
            step = Blending(blend.name, features, blend.sources, blend.alphas, blend.mask, run.grids)
            model_options = call.options_with(**{blend.name: step})
        denoised = executor(x, timestep, model_options, seed, **kwargs)
        if not pinned:
            return denoised
        sigma_next = max((level for level in run.levels if level < sigma * (1 - 1e-5)), default=0.0)
        there = blend.target(sigma, sigma_next).to(x)
        return maths.blend(denoised, maths.straight_line_denoised(here, there, sigma, sigma_next), mask)


def settings_name() -> str:
    """A name of its own for one node's patches among the options."""
    return PREFIX + uuid.uuid4().hex


def sources_of(layers: list[FeatureLayer], quirks: bool) -> dict[Feature, Feature]:
    """Which feature of the reference each feature is blended with: itself.

    quirks: PFB-Diff's code blends what the middle block returned into what it is given.
    """
    found = {layer.key: layer.key for layer in layers}
    return found | {MIDDLE: AFTER_MIDDLE} if quirks and MIDDLE in found else found


def install(model: Any, blend: BlendFeatures) -> Any:
    """A clone of the model that blends. Raises ValueError where another node has replaced the network's end."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    network, met = model.model.diffusion_model, {*blend.alphas, *blend.sources.values()}
    if any(block in ("input", "middle") for block, _ in met):
        patched.set_model_input_block_patch_after_skip(AfterInputBlock(blend.name, len(network.input_blocks) - 1))
    if any(block == "output" for block, _ in met):
        patched.set_model_output_block_patch(BeforeOutputBlock(blend.name))
    if OUT in met:
        # What stands in the network now may be another clone's that is loaded: its children are ours, its names not.
        earlier = model.object_patches.get("diffusion_model.out")
        previous = network.out if earlier is None else earlier
        if not isinstance(previous, nn.Sequential):
            raise ValueError(
                "another node has replaced the end of the network, so that 'out' cannot be blended: take it out, or "
                "leave 'out' off the layers."
            )
        names = (*getattr(earlier, "names", ()), blend.name)
        patched.add_object_patch("diffusion_model.out", BlendBeforeOut(previous, names))
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, blend.name, share_options)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, blend.name, StartRun(blend.name))
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, blend.name, BeginSampling(blend))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, blend.name, BlendStep(blend))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, blend.name, NoteAreas(blend.name))
    return patched
