"""Finds the noise from which the model redraws your picture; on flow models too."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import latent_preview
import torch
from comfy_api.latest import io

from .. import host, inputs, sockets
from ..settings import AS_SET_ABOVE
from . import contextual, ddim, flow, measure
from .flow_nodes import FlowEdit, FlowSampler

TECHNIQUE = "Invert Picture"
POOR = 0.3  # of the latent's deviation: a picture that comes back so far off is another one


class Invert(io.ComfyNode):
    """Inversion (of diffusion models DDIM's): the latents a picture passes through on its way to noise."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestInvert",
            display_name="Invert Picture",
            category="palimpsest/inversion",
            description="Finds the noise from which the model redraws your picture, and records every latent on the "
            "way. Connect the trajectory to Tune KV to make the redrawing exact and to edit by a new prompt.",
            search_aliases=[
                "ddim inversion",
                "unsampler",
                "null text",
                "real image editing",
                "noise from image",
                "photo",
                "edit photo",
                "flux inversion",
                "rf inversion",
                "uni-inv",
                "fireflow",
                "flow matching",
                "noise",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will edit the picture, with any LoRA: SD 1.x, SD 2.x, SDXL, or "
                    "a flow-matching one (SD3, Flux, Z-Image, Qwen-Image), then with its ModelSampling node.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The picture, through VAE Encode. A batch inverts all its pictures; "
                    "of a video model a clip is inverted whole.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A prompt that describes the picture as it is. The better it fits, the better edits keep "
                    "the rest.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt; only needed where a guidance differs from 1."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Only for the report: measures the reconstruction in pixels, too."
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps between picture and noise. 50 (default) is the papers'; 30 to 50: more follow the "
                    "picture closer and cost in proportion (one model call a step). Edit with the same number.",
                ),
                inputs.guidance(
                    default=1.0,
                    tooltip="Guidance while inverting. 1 (default) is stable and half the cost; higher values leave "
                    "noise that reconstructs worse.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="normal",
                    tooltip="Spacing of the noise levels. Edit with the same scheduler. Unused when sigmas is "
                    "connected.",
                ),
                io.Combo.Input(
                    "predict_at",
                    options=[ddim.NEXT_LEVEL, ddim.CURRENT_LEVEL],
                    advanced=True,
                    tooltip="Diffusion models only. Where each step asks the model for its noise: at the level it "
                    "climbs to (default; as published inversion code, reconstructs best), or at the level it stands on "
                    "(the equation solved literally).",
                ),
                io.Float.Input(
                    "reconstruction_guidance",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Guidance of a test reconstruction for the report: 1 shows the inversion's own error, "
                    "your editing guidance shows what an edit would lose. 0 skips it and saves as many model calls as "
                    "steps.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels from a scheduler node, instead of steps and scheduler. End at 0. Their low "
                    "part alone (Split Sigmas) leaves more of the picture standing.",
                ),
                io.Combo.Input(
                    "flow_method",
                    options=list(flow.UP),
                    advanced=True,
                    tooltip="Flow-matching models only. Uni-Inv (default): the way down is the host's euler, at any "
                    "number of steps. FireFlow: nearer at 8 to 15 steps, and only with Flow Inversion Sampler on the "
                    "way down. Euler: plain, to compare with.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AS_SET_ABOVE, *ddim.InvertSettings.PRESETS],
                    optional=True,
                    advanced=True,
                    tooltip="as set above (default): the values of this node act. The others are stage 1 of KV "
                    "Inversion's paper in 50 steps: Algorithm 1 inverts at guidance 7.5, which needs the negative "
                    "prompt; equation 4 at guidance 1. Take the same one in Tune KV and Apply KV.",
                ),
                sockets.ContextAdapter.Input(
                    "context_adapter",
                    optional=True,
                    tooltip="Inverts on the path that this adapter shifts (ContextDiff), so that nodes which look at "
                    "the source see it where the Context-Aware Sampler with the same adapter draws. predict_at and "
                    "flow_method do not act then. Empty: the plain path.",
                ),
                io.Float.Input(
                    "context_strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Only with context_adapter: the strength of the Context-Aware Sampler that edits, whose "
                    "other values stay at their defaults. 0.5 to 1.5 is useful.",
                ),
                io.Int.Input(
                    "context_refinements",
                    default=6,
                    min=0,
                    max=40,
                    optional=True,
                    advanced=True,
                    tooltip="Only with context_adapter: corrections of each step, so that the sampler undoes it "
                    "closer. Each costs one more model call a step; 2 leaves a small error, 6 (default) nearly none.",
                ),
            ],
            outputs=[
                sockets.Trajectory.Output(display_name="trajectory", tooltip="The latents of every step, for Tune KV."),
                io.Latent.Output(
                    display_name="noise",
                    tooltip="The inverted noise. Sample from it with added noise disabled (KSampler Advanced: "
                    "add_noise disable; SamplerCustomAdvanced: DisableNoise). Flow-matching models multiply it by 0: "
                    "there it is only the latent_image beside inverted_noise.",
                ),
                io.Latent.Output(
                    display_name="reconstruction",
                    tooltip="The test reconstruction (the source itself when it is skipped).",
                ),
                io.String.Output(display_name="report", tooltip="The measured reconstruction error."),
                io.Noise.Output(
                    display_name="inverted_noise",
                    tooltip="The inverted noise for SamplerCustomAdvanced, the only way on flow-matching models: "
                    "sample the same SIGMAS, with any latent of the picture's size.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(
        cls, model, latent, positive, negative=None, vae=None, sigmas=None, context_adapter=None, **chosen
    ) -> io.NodeOutput:
        """Invert, then sample once from the noise to measure how exact the inversion is."""
        kind = host.kind_of_path(model, TECHNIQUE)
        settings, samples = ddim.InvertSettings.of(chosen), checked_latent(model, latent)
        require_negatives(settings, negative)
        levels = ddim.descending_schedule(model, settings.scheduler, settings.steps, sigmas)
        if kind == host.FLOW:
            host.require_flow_levels(levels)
        context = contextual.context_sampling(context_adapter, settings)
        contextual.require_undone(model, context, levels)
        inputs.require_active(model, levels, settings.guidance, positive=positive, negative=negative)
        if strength := settings.reconstruction_guidance:
            inputs.require_active(model, levels, strength, negative=negative)
        trajectory = ddim.invert(
            model,
            samples,
            positive,
            negative,
            levels=levels,
            guidance=settings.guidance,
            predict_at=settings.predict_at,
            flow_method=settings.flow_method,
            context=context,
            callback=latent_preview.prepare_callback(model, len(levels) - 1),
        )
        start = host.in_dimensions_of(trajectory.latents[0].clone(), samples)
        noise = model.model.process_latent_out(start.clone())
        rebuilt, error, numbers = samples, "reconstruction not measured", {}
        if strength := settings.reconstruction_guidance:
            down = context or (flow.FlowSampling(settings.flow_method) if kind == host.FLOW else ddim.descend)
            rebuilt = reconstruction(model, down, noise, positive, negative, levels=levels, guidance=strength)
            numbers = measure.reconstruction_error(rebuilt, samples, vae)
            error = f"reconstruction at guidance {strength:g}: {measure.error_in_words(numbers)}"
        report = "; ".join(
            [f"{trajectory.steps} steps, {error}", *remarks(model, settings, latent, numbers, levels, context)]
        )
        report += host.unseen_picture(model, positive)
        given = host.FoundNoise(model, trajectory.latents[0], levels[0])
        if kind == host.FLOW:
            noise = model.model.process_latent_out(host.before_fading(start, levels[0]))
        return io.NodeOutput(
            trajectory, {"samples": noise}, {"samples": rebuilt}, report, given, ui=host.told(cls, report)
        )


def remarks(
    model: Any,
    settings: ddim.InvertSettings,
    latent: dict,
    numbers: dict[str, float],
    levels: tuple[float, ...],
    context: Any = None,
) -> list[str]:
    """What a report adds to the measured error."""
    found = []
    if context is not None:
        strength = f"strength {settings.context_strength:g}"
        found.append(f"with a context adapter: edit by the Context-Aware Sampler with the same one, {strength}")
        found += contextual.how_to_begin(model, levels)
    if host.is_flow(model) and context is None:
        fireflow = settings.flow_method == flow.FIREFLOW
        down = "Flow Inversion Sampler (FireFlow)" if fireflow else "sampler euler"
        found.append(f"to edit: SamplerCustomAdvanced, inverted_noise, {down}, the same sigmas")
        if numbers.get("latent_rmse", 0.0) > POOR:
            found.append("this is not the picture: take more steps, guidance 1, flow_method Uni-Inv or FireFlow")
        if host.few_steps_only(model) or numbers.get("latent_rmse", 0.0) > POOR:
            found.append(
                "models distilled to a few steps (schnell, Turbo, Lightning, distilled Klein) do not invert well: take "
                "their base model, or FlowEdit Sampler"
            )
    if 1.0 in (settings.guidance, settings.reconstruction_guidance) and (others := host.guiding_nodes(model)):
        found.append(f"at guidance 1 the guidance of other nodes was left out ({others})")
    if "noise_mask" in latent:
        found.append("the latent's mask was left out (inversion needs the whole picture)")
    return found


def require_negatives(settings: ddim.InvertSettings, negative: list | None) -> None:
    """Raise ValueError where one of the two guidances needs a negative prompt and there is none."""
    inputs.require_negative(settings.guidance, negative)
    if settings.reconstruction_guidance:
        inputs.require_negative(settings.reconstruction_guidance, negative, "reconstruction_guidance")


def reconstruction(model, down, noise: torch.Tensor, positive: list, negative: list | None, *, levels, guidance: float):
    """What the model draws from inverted noise by the sampler function `down`, as on a LATENT socket."""
    return host.sample(
        model,
        down,
        noise,
        sigmas=torch.tensor(levels),
        positive=positive,
        negative=negative,
        guidance=guidance,
        callback=latent_preview.prepare_callback(model, len(levels) - 1),
    ).cpu()


def checked_latent(model, latent: dict) -> torch.Tensor:
    """A LATENT's samples, of a video model as a clip, of one frame where it is a picture.

    Raises ValueError for clips of other models, foreign channel counts and empty pictures.
    """
    samples = latent["samples"]
    host.require_channels(model, samples)
    video = model.get_model_object("latent_format").latent_dimensions == 3
    if video and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != (5 if video else 4):
        raise ValueError(
            f"the latent has shape {tuple(samples.shape)}, Invert Picture takes pictures of {samples.shape[1]} latent "
            "channels (batch, channels, height, width): give a clip as a batch of frames."
        )
    if torch.count_nonzero(samples) == 0:
        raise ValueError("the latent is empty (all zero): inversion starts from a picture, connect VAE Encode.")
    return samples


NODES = [Invert, FlowEdit, FlowSampler]
