"""Samplers for flow-matching models: FlowEdit, and the way down that belongs to an inversion."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from .. import host, inputs
from . import flow, flow_edit


class FlowEdit(io.ComfyNode):
    """FlowEdit: an edit without inversion."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestFlowEdit",
            display_name="FlowEdit Sampler",
            category="palimpsest/inversion",
            description="Edits a picture with a flow-matching model (SD3, Flux, Z-Image, Qwen-Image) without inverting "
            "it: it moves by the difference between what the model says to the new prompt and to the old one. For "
            "SamplerCustomAdvanced: the picture as latent_image, the new prompt in the guider.",
            search_aliases=[
                "flow edit",
                "inversion free editing",
                "edit photo flux",
                "img2img by prompt",
                "change object",
                "rf edit",
            ],
            inputs=[
                io.Conditioning.Input(
                    "source",
                    tooltip="A prompt that describes the picture as it is. What it shares with the new prompt (in the "
                    "guider) stays; name what you want to change in both.",
                ),
                io.Conditioning.Input(
                    "source_negative",
                    optional=True,
                    tooltip="Negative prompt of the source; only needed where source_guidance differs from 1.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is edited, black stays as it is, to the bit in the latent; greys edit in part. "
                    "Without it the whole picture may change.",
                ),
                io.Float.Input(
                    "source_guidance",
                    default=3.5,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance of the source prompt. 3.5 (default) is the paper's for SD3, whose new prompt has "
                    "cfg 13.5 in the guider: the further the two lie apart, the stronger the edit. Flux.1 dev: 1 here "
                    "and in the guider, and Flux Guidance 1.5 and 5.5 on the two prompts.",
                ),
                *inputs.percents(
                    start="Where the edit begins, as a share of the sampling. 0.34 (default, the paper's for SD3) "
                    "keeps the layout; 0.14 (its Flux.1 dev) to 0.2 lets shapes change; 0.5 and more change little.",
                    end="Where the edit ends and the rest is sampled plainly. 1 (default) is the paper's; 0.8 to 0.9 "
                    "gives freer, sharper detail that follows the picture less.",
                    default_start=0.34,
                ),
                io.Int.Input(
                    "averages",
                    default=1,
                    min=1,
                    max=16,
                    advanced=True,
                    tooltip="Draws of noise a step, whose directions are averaged. 1 (default) is the paper's; 2 to 4 "
                    "give steadier, smoother edits and cost in proportion.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For SamplerCustomAdvanced with RandomNoise (its seed draws the noise), CFGGuider and a "
                    "scheduler's SIGMAS. An inpainting mask on the latent counts, too.",
                )
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, source, source_negative=None, mask=None, **chosen) -> io.NodeOutput:
        """A sampler object of the host."""
        settings = flow_edit.FlowEditSettings.of(chosen)
        inputs.require_negative(settings.source_guidance, source_negative, "source_guidance")
        prompts = flow_edit.Source(source, source_negative, settings.source_guidance)
        remarks = host.Remarks.of(cls)
        sampler = comfy.samplers.KSAMPLER(flow_edit.FlowEditing(prompts, settings, mask, remarks))
        return io.NodeOutput(sampler, ui=host.told(cls, edited_part(mask), remarks))


def edited_part(mask: Tensor | None) -> str:
    """Where FlowEdit acts, as its node says it."""
    if mask is None:
        return "the whole picture may change"
    colour = host.one_colour(mask)
    if colour == "black":
        return "the mask is black all over, so that the picture stays as it is: paint where it may change"
    return "the whole picture may change" if colour else f"{float(mask.float().mean()):.0%} of the picture may change"


class FlowSampler(io.ComfyNode):
    """The way down: FireFlow's, or Euler's with rows that follow the source exactly."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestFlowSampler",
            display_name="Flow Inversion Sampler",
            category="palimpsest/inversion",
            description="Samples from the noise of Invert Picture on a flow-matching model the way it was found: "
            "FireFlow's steps, which the host's euler does not make. With a trajectory the first rows of a batch "
            "follow the source exactly.",
            search_aliases=["fireflow", "rf solver", "flow inversion", "direct inversion", "midpoint sampler"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=[flow.FIREFLOW, flow.EULER],
                    tooltip="FireFlow (default) belongs to an inversion by FireFlow: one model call a step, one more "
                    "at the start. Euler belongs to Uni-Inv and Euler, as the host's euler does.",
                ),
                inputs.trajectory(
                    "Only for exact rows: the source's latents, which the first rows of the batch are held on.",
                    optional=True,
                ),
                io.Int.Input(
                    "source_rows",
                    default=1,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="How many rows of the batch, from the first, are the source and follow its trajectory "
                    "exactly, for nodes that let edits look at other rows. 1 (default); without a trajectory unused.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For SamplerCustomAdvanced, with inverted_noise and the SIGMAS of the inversion.",
                )
            ],
        )

    @classmethod
    def execute(cls, trajectory=None, **chosen) -> io.NodeOutput:
        """A sampler object of the host."""
        settings = flow.FlowSamplerSettings.of(chosen)
        return io.NodeOutput(
            comfy.samplers.KSAMPLER(flow.FlowSampling(settings.method, trajectory, settings.source_rows))
        )
