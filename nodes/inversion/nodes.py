"""Invert: a real picture becomes the noise that the model would turn back into it."""

from __future__ import annotations

import comfy.samplers
import latent_preview
import torch
from comfy_api.latest import io

from .. import host, sockets
from . import ddim as inverting
from . import measure


class Invert(io.ComfyNode):
    """DDIM inversion (stage 1 of KV Inversion): the latents a picture passes through on its way to noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does to the picture."""
        return io.Schema(
            node_id="PalimpsestInvert",
            display_name="Invert Picture",
            category="palimpsest/inversion",
            description="Finds the noise from which the model redraws your picture, and records every latent on the "
            "way. "
            "Connect the trajectory to Tune KV to make the redrawing exact and to edit by a new prompt.",
            search_aliases=["ddim inversion", "unsampler", "null text", "real image editing", "noise from image"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will edit the picture. SD 1.x, SD 2.x or SDXL, with any LoRA."
                ),
                io.Latent.Input("latent", tooltip="The picture, through VAE Encode. A batch inverts all its pictures."),
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
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps between picture and noise. 20 to 50: more follow the picture closer and cost in "
                    "proportion "
                    "(one model call a step). Edit with the same number.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance while inverting. 1 (default) is stable and half the cost; higher values leave "
                    "noise that "
                    "reconstructs worse.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="normal",
                    tooltip="Spacing of the noise levels. Edit with the same scheduler. Unused when sigmas is "
                    "connected.",
                ),
                io.Combo.Input(
                    "evaluate_at",
                    options=[inverting.NEXT_LEVEL, inverting.CURRENT_LEVEL],
                    advanced=True,
                    tooltip="Where each step asks the model for its noise: at the level it climbs to (default; as "
                    "published "
                    "inversion code, reconstructs best), or at the level it stands on (the equation solved literally).",
                ),
                io.Float.Input(
                    "reconstruct_at",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Guidance of a test reconstruction for the report: 1 shows the inversion's own error, "
                    "your editing "
                    "guidance shows what an edit would lose. 0 skips it and saves as many model calls as steps.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels from a scheduler node, instead of steps and scheduler. End at 0.",
                ),
            ],
            outputs=[
                sockets.Trajectory.Output(display_name="trajectory", tooltip="The latents of every step, for Tune KV."),
                io.Latent.Output(
                    display_name="noise",
                    tooltip="The inverted noise. Sample from it with added noise disabled (KSampler Advanced: "
                    "add_noise disable; "
                    "SamplerCustomAdvanced: DisableNoise).",
                ),
                io.Latent.Output(
                    display_name="reconstruction",
                    tooltip="The test reconstruction (the source itself when it is skipped).",
                ),
                io.String.Output(display_name="report", tooltip="The measured reconstruction error."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        positive,
        steps,
        guidance,
        scheduler,
        evaluate_at,
        reconstruct_at,
        negative=None,
        vae=None,
        sigmas=None,
    ) -> io.NodeOutput:
        """Invert, then sample once from the noise to measure how exact the inversion is."""
        host.require_unet(model, "Invert Picture")
        samples = checked_latent(model, latent)
        for name, value in (("guidance", guidance), ("reconstruct_at", reconstruct_at)):
            if negative is None and value not in (0.0, 1.0):
                raise ValueError(
                    f"{name} is {value:g}: guidance other than 1 needs the negative prompt; connect one (empty text)."
                )
        levels = inverting.descending_schedule(model, scheduler, steps, sigmas)
        progress = latent_preview.prepare_callback(model, len(levels) - 1)
        trajectory = inverting.invert(model, samples, positive, negative, levels, guidance, evaluate_at, progress)
        noise = model.model.process_latent_out(trajectory.latents[0].clone())
        rebuilt, report = samples, f"{trajectory.steps} steps, reconstruction not measured"
        if reconstruct_at:
            rebuilt = host.sample(
                model,
                inverting.descend,
                noise,
                sigmas=torch.tensor(levels),
                positive=positive,
                negative=negative,
                guidance=reconstruct_at,
                callback=latent_preview.prepare_callback(model, trajectory.steps),
            ).cpu()
            numbers = measure.reconstruction(rebuilt, samples, vae)
            report = (
                f"{trajectory.steps} steps, reconstruction at guidance {reconstruct_at:g}: {measure.sentence(numbers)}"
            )
        if "noise_mask" in latent:
            report += "; the latent's mask was left out (inversion needs the whole picture)"
        host.show_text(host.node_id(cls), report)
        return io.NodeOutput(trajectory, {"samples": noise}, {"samples": rebuilt}, report)


def checked_latent(model, latent: dict) -> torch.Tensor:
    """A LATENT's samples. Raises ValueError for video latents, foreign channel counts, empty or NaN pictures."""
    samples = latent["samples"]
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"the latent has shape {tuple(samples.shape)}, this model edits pictures of {channels} latent channels: "
            "encode the picture with this checkpoint's own VAE."
        )
    if not torch.isfinite(samples).all():
        raise ValueError("the latent holds NaN or infinite values: look at the picture and the VAE before it.")
    if torch.count_nonzero(samples) == 0:
        raise ValueError("the latent is empty (all zero): inversion starts from a picture, connect VAE Encode.")
    return samples


NODES = [Invert]
