"""The source's features flow back in, by mask and level."""

from __future__ import annotations

import time

import latent_preview
from comfy_api.latest import io

from .. import host, inputs, saving, sockets
from . import apply as feature_apply
from . import files, pairs, plot, tuning
from .fitting import PAPER
from .latents import SOURCE_LATENTS
from .weights import BlendWeights

CATEGORY = "palimpsest/regions"
CUSTOM = "custom"
LAYERS_TOOLTIP = (
    "Which features are blended, named by the block whose input they are: 'input 8-11, middle, output 1-5'. "
    "'output 0' is what the middle block returns, 'out' what the last block returns; 'output' alone is all of that "
    "place. Coarse ones (middle and its neighbours) carry layout, those near 'out' carry texture. In transformers what "
    "blocks return: 'double 4-18, single'; input, output and out are their first half, second half and last one."
)


class FeatureBlend(io.ComfyNode):
    """Progressive feature blending: eq. 1 of the founding paper and PFB-Diff's masks in one formula."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestFeatureBlend",
            display_name="Feature Blend",
            category=CATEGORY,
            description="Lets the source flow back into an edit while it is sampled: outside of a mask the model's "
            "features and the latent are the source's, so that the rest of the picture stays and both parts fit.",
            search_aliases=[
                "pfb-diff",
                "progressive feature blending",
                "blended diffusion",
                "keep background",
                "MGIE",
                "replace background",
                "change background",
                "recolour",
                "inpaint",
                "keep",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples the edit. Patches of other nodes stay active."),
                inputs.trajectory("The source's latents, from Invert Picture. Sample at the same picture size."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt that describes the source, as in Invert Picture; the edit's own prompt goes "
                    "to the sampler. ControlNets on it are left out.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *feature_apply.BlendSettings.PRESETS],
                    tooltip="custom: the values under this line act. The others replace alphas, layers, percents, "
                    "blend_latents_until and grow_mask. paper: half source, half edit everywhere, no mask. PFB-Diff "
                    "object and background: the authors' scripts for changing an object or what is around it.",
                ),
                io.Float.Input(
                    "alpha_inside",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The edit's share of a feature where the mask is white, and everywhere without a mask. 1: "
                    "the edit is free. 0.6 to 0.9 ties its shape to the source's.",
                ),
                io.Float.Input(
                    "alpha_outside",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The edit's share of a feature where the mask is black. 0: the source. With both alphas "
                    "at 1 no feature is blended, at no cost.",
                ),
                io.String.Input("layers", default="output, out", tooltip=LAYERS_TOOLTIP),
                *inputs.percents(
                    start="When blending of features begins, as a share of the sampling. 0: from the first step, "
                    "which lays out the picture.",
                    end="When blending of features stops. 1: at the last step; 0.8 lets the model join both parts on "
                    "its own.",
                ),
                io.Float.Input(
                    "blend_latents_until",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the sampling for which the latent outside of the mask is held to the source. "
                    "1: it ends as the source's, seams may show. 0.5 (default, PFB-Diff's for objects) to 0.8: the "
                    "last steps mend seams. 0: never.",
                ),
                io.Combo.Input(
                    "source_latents",
                    options=list(SOURCE_LATENTS),
                    tooltip="trajectory (default): the source's inverted latents, which the model rebuilds. "
                    "re-noised source: the source under one fixed noise, as blended diffusion does; freer, less exact.",
                ),
                inputs.source_features(
                    "cached: the source's features are recorded when this node runs (one row a level) and kept in "
                    "memory; sampling then costs nothing more. same step: made beside every step, half as much again "
                    "with guidance, no memory but the GPU's for one step. auto: cached where it fits in a quarter of "
                    "the free memory. A clip takes as many times a picture's memory as its latent has frames: a block "
                    "of Wan 14B at 832 x 480, 81 frames, 0.34 GB a level; layers 'out' keeps it to one block."
                ),
                io.Boolean.Input(
                    "released_code",
                    default=False,
                    advanced=True,
                    tooltip="As PFB-Diff's published code does it: the middle block's input is blended with what it "
                    "returned, the latent with the noise level just left, and sampling from inverted noise begins one "
                    "level late. For comparison only.",
                ),
                io.Float.Input(
                    "grow_mask",
                    default=0.0,
                    min=-16.0,
                    max=16.0,
                    step=0.25,
                    advanced=True,
                    tooltip="Grows the mask's white by this many cells of 8 pixels (16 on FLUX.2); below 0 it "
                    "shrinks. 1 to 2 give a new outline room; PFB-Diff shrinks a background's mask by 2.25.",
                ),
                inputs.seed(
                    "Seed of the fixed noise of source_latents 're-noised source'; unused otherwise.", advanced=True
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit may act, black where the source stays: the object to recolour, or "
                    "everything but the animal to change the place. Any size, soft edges allowed, one for all or one "
                    "a picture; of a clip of a video model one for each frame.",
                ),
                sockets.BlendWeights.Input(
                    "blend_weights",
                    optional=True,
                    tooltip="From Tune Feature Blend or Load Blend Weights: they replace layers and both alphas. The "
                    "mask then acts on the latent only.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that blends the source in, for a sampler."),
                io.String.Output(
                    display_name="report", tooltip="What is blended, where its features come from and what that takes."
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, trajectory, positive, mask=None, blend_weights=None, **chosen) -> io.NodeOutput:
        remarks = host.Remarks.of(cls)
        applied = feature_apply.apply(
            model,
            trajectory,
            positive,
            feature_apply.BlendSettings.of(chosen),
            mask=mask,
            weights=blend_weights,
            callback=latent_preview.prepare_callback(model, trajectory.steps),
            remarks=remarks,
        )
        report = applied.report + inputs.prompt_note(trajectory, positive)
        return io.NodeOutput(applied.model, report, ui=host.told(cls, report, remarks))


class TuneFeatureBlend(io.ComfyNode):
    """Learn one blending weight a feature for a picture and an edit."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTuneFeatureBlend",
            display_name="Tune Feature Blend",
            category=CATEGORY,
            description="Learns for every feature of the model how much of it should be the edit's and how much the "
            "source's, so that the picture stays where it should and the edit still shows. The model is not trained.",
            search_aliases=["learnable alpha", "blending weight", "pfb-diff", "progressive feature blending", "MGIE"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with."),
                inputs.trajectory("The source's latents, from Invert Picture."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt that describes the source, as in Invert Picture."
                ),
                io.Conditioning.Input("target_positive", tooltip="The prompt of the edit you will sample."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt you will sample the edit with."
                ),
                io.String.Input("layers", default="output, out", tooltip=LAYERS_TOOLTIP),
                io.Int.Input(
                    "steps",
                    default=100,
                    min=1,
                    max=10000,
                    tooltip="Steps of learning, each at one noise level. 60 to 200; each costs about three model "
                    "calls.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.1,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of a learning step. 0.05 to 0.2; lower needs more steps.",
                ),
                inputs.guidance("The guidance you will sample the edit with. 7.5 (default) is PFB-Diff's; 5 to 7.5."),
                io.Float.Input(
                    "keep_edit",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How much the edit inside of the mask (or everywhere without one) weighs against "
                    "rebuilding the source. 0: rebuilding alone, which ends with nothing of the edit. 0.5 to 3.",
                ),
                io.Float.Input(
                    "adversarial",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Weight of an adversarial term: a small discriminator learns alongside to tell predictions "
                    "from patches of the source. 0 (default): off. 0.05 to 0.5 sharpens at some cost in time.",
                ),
                inputs.seed("Order of the noise levels, and the discriminator's start.", advanced=True),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit should show, black where the source should be rebuilt. Without it "
                    "both are asked everywhere and keep_edit decides. Off where edited is connected.",
                ),
                io.Latent.Input(
                    "edited",
                    optional=True,
                    tooltip="The trajectory's pictures as they should be, through VAE Encode: one for each, in their "
                    "order. With it the weights learn to draw these, from all pairs together, as the paper does it; "
                    "keep_edit then does nothing. 8 to 32 pairs serve other pictures as well.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, PAPER],
                    tooltip="custom: the values above act. paper: pairs alone, output features from the bottleneck to "
                    "the end, and a small adversarial term beside the reconstruction; needs edited.",
                ),
                io.Int.Input(
                    "pairs_per_step",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="How many pairs of edited each step learns from. 1 (default) takes the memory of one "
                    "picture; 2 to 4 are steadier, at their cost.",
                ),
            ],
            outputs=[
                sockets.BlendWeights.Output(
                    display_name="blend_weights",
                    tooltip="The learned alphas, for Feature Blend and Save Blend Weights.",
                ),
                io.Image.Output(display_name="plot", tooltip="Every feature's alpha as a bar, and the loss."),
                io.String.Output(display_name="report", tooltip="The learned values, loss and time."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(
        cls, model, trajectory, positive, target_positive, negative=None, mask=None, edited=None, **chosen
    ) -> io.NodeOutput:
        if chosen.get("preset") == PAPER and edited is None:
            raise ValueError(
                "preset 'paper' learns from pictures as they should be, and edited is empty: connect one for each "
                "picture of the trajectory (VAE Encode), or set preset to 'custom', which needs the source alone."
            )
        settings = tuning.TuneSettings.of(chosen)
        inputs.require_negative(settings.guidance, negative)
        began, shown = time.monotonic(), host.ProgressText(host.node_id(cls))
        weights = tuning.tune(
            model,
            trajectory,
            tuning.Prompts(positive, target_positive, negative),
            settings,
            mask=mask,
            edited=None if edited is None else edited["samples"],
            report=lambda step, loss: shown.update(f"step {step + 1} of {settings.steps}, loss {loss:.3f}"),
            recording=latent_preview.prepare_callback(model, trajectory.steps),
            callback=latent_preview.prepare_callback(model, settings.steps),
        )
        report = f"learned {described(weights)}, {time.monotonic() - began:.0f} s"
        report += "" if edited is None else pairs.seen(trajectory, settings)
        return io.NodeOutput(weights, plot.draw(weights), report, ui=host.told(cls, report))


def described(weights: BlendWeights) -> str:
    """Weights and how they were learned, in a line."""
    return f"{weights}; {weights.learning}"


KEPT = saving.Kept(
    name="Blend Weights",
    id="BlendWeights",
    category=CATEGORY,
    socket=sockets.BlendWeights,
    input="blend_weights",
    shelf=files.SHELF,
    save=files.save,
    load=files.load,
    describe=described,
    made_by="Tune Feature Blend",
    used_by="Feature Blend",
    filename="blend",
)


class SaveBlendWeights(io.ComfyNode):
    """Write learned blending weights to models/palimpsest_blend."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return saving.save_schema(
            KEPT,
            "Saves learned blending weights as a .safetensors file in models/palimpsest_blend, for Load Blend Weights.",
            ["feature blend", "save alphas"],
        )

    @classmethod
    def validate_inputs(cls, filename=None) -> bool | str:
        return saving.checked(filename, files.SHELF.try_new)

    @classmethod
    def execute(cls, blend_weights, filename=None) -> io.NodeOutput:
        return saving.save(cls, KEPT, blend_weights, filename)


class LoadBlendWeights(io.ComfyNode):
    """Read blending weights from models/palimpsest_blend."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return saving.load_schema(
            KEPT,
            "Loads blending weights that Save Blend Weights wrote, so that they serve other pictures and edits without "
            "tuning.",
            ["feature blend", "load alphas"],
        )

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return files.SHELF.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return saving.load(cls, KEPT, file)


SHELVES = [files.SHELF]
NODES = [FeatureBlend, TuneFeatureBlend, SaveBlendWeights, LoadBlendWeights]
