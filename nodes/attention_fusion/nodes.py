"""An edit looks where the source looked."""

from __future__ import annotations

import latent_preview
from comfy_api.latest import io

from .. import host, inputs
from . import apply as fusion_apply
from .apply import FATEZERO_LAYERS
from .prompts import NEW_WORDS


class AttentionFusion(io.ComfyNode):
    """FateZero's attention fusion (arXiv:2303.09535), as the ContextDiff paper edits clips with it."""

    @classmethod
    @inputs.completed("source_text", "edit_text")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestAttentionFusion",
            display_name="Attention Fusion",
            category="palimpsest/context",
            description="Edits a picture or a clip by changing words of its prompt: for the first part of the sampling "
            "the edit looks where the source looked, so that layout, pose and motion stay and only the changed words "
            "change. No training.",
            search_aliases=[
                "fatezero",
                "prompt to prompt",
                "p2p",
                "attention injection",
                "video editing",
                "word swap",
                "contextdiff",
                "edit photo",
                "replace object",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the source was inverted with; patches of other nodes stay active. For a "
                    "clip, put Video Attention before both.",
                ),
                inputs.trajectory(
                    "The source's latents, from Invert Picture: one picture, or all frames of a clip as a batch. "
                    "Sample at the same size, and from the noise of the same inversion."
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the model. It encodes both prompts here."),
                io.String.Input(
                    "source_text",
                    multiline=True,
                    default="a brown dog standing on the left in the park",
                    dynamic_prompts=True,
                    tooltip="The prompt that describes the source, the same text as in Invert Picture.",
                ),
                io.String.Input(
                    "edit_text",
                    multiline=True,
                    default="a red dog standing on the left in the park",
                    dynamic_prompts=True,
                    tooltip="The prompt of the edit. Keep the source's words and their order and change or add those "
                    "that should change: words that both have keep the places they act on.",
                ),
                io.Float.Input(
                    "self_attention_until",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the sampling for which self-attention is the source's, which holds shapes and "
                    "motion. 0.5: the paper. 0.8 for colour and style, 0.2 to 0.4 where shapes may change. 0: never.",
                ),
                io.Float.Input(
                    "cross_attention_until",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the sampling for which words of both prompts act where they did in the source. "
                    "0.5: the paper; 0.8 holds the layout tighter. With self_attention_until 0 too it is the plain "
                    "model, bit for bit.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip="Words of source_text whose shape may change, for instance an animal that becomes another; "
                    "where the source shows them, self-attention is the edit's own. Empty: the source's "
                    "everywhere, best for colours and style.",
                ),
                io.Float.Input(
                    "blend_threshold",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For blend_words: how strongly, against the strongest place, a place must attend to them "
                    "to count. 0.3: the published value. Lower frees a larger region, 1 frees nothing.",
                ),
                io.Combo.Input(
                    "new_words",
                    options=list(NEW_WORDS),
                    tooltip="What words act by that only the edit has. their own attention: they find their own place. "
                    "attention of the words they replace: exactly where the old words acted, for swaps of one thing or "
                    "colour for another.",
                ),
                io.Float.Input(
                    "emphasis",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Multiplies the attention of the words that only the edit has, while "
                    "cross_attention_until lasts. 1: none. 2 to 4 where an edit does not come through; FateZero's "
                    "settings go up to 20.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(host.SELF_ATTENTION),
                    default=FATEZERO_LAYERS,
                    tooltip="Where attention is fused. all: everywhere. all but the finest (default): as FateZero, "
                    "which keeps maps up to 32 x 32; leaves texture to the edit and halves SD 1.5's memory.",
                ),
                io.Boolean.Input(
                    "fuse_negative",
                    default=False,
                    advanced=True,
                    tooltip="Fuse self-attention in the negative prompt's rows as well. Off: as published. On "
                    "changes little at guidance 3; try it where high guidance pulls shapes away.",
                ),
                inputs.source_features(
                    "Where the source's attention comes from. cached: recorded when this node runs; a frame and step "
                    "take 71 MB for SD 1.5 at 512 px (all but the finest 32), 642 MB for SDXL at 1024 px. same step: "
                    "one more row of the network in each fused step. auto: cached where it fits in a quarter of the "
                    "free memory."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Instead of blend_words: white where the edit's shapes may change, black where the "
                    "source's stay. Any size, soft edges allowed; one for all frames, or one for each.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that fuses, for a sampler that starts from the inverted noise."),
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The edit's prompt, encoded. Sample with this one: it is how its rows are found again.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Which words both prompts share, where the source's attention comes from, and what that "
                    "takes.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, trajectory, clip, mask=None, **chosen) -> io.NodeOutput:
        remarks = host.Remarks.of(cls)
        applied = fusion_apply.apply(
            model,
            trajectory,
            clip,
            fusion_apply.FusionSettings.of(chosen),
            mask=mask,
            callback=latent_preview.prepare_callback(model, trajectory.steps),
            remarks=remarks,
        )
        return io.NodeOutput(
            applied.model, applied.positive, applied.report, ui=host.told(cls, applied.report, remarks)
        )


NODES = [AttentionFusion]
