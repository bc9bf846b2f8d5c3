"""Frames look at one another."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host, inputs
from . import attention as video_attention


class VideoAttention(io.ComfyNode):
    """Sparse-causal attention (Tune-A-Video, arXiv:2212.11565) for an image model, without training."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestVideoAttention",
            display_name="Video Attention",
            category="palimpsest/context",
            description="Lets the frames of a clip look at one another while they are drawn, so that colours, textures "
            "and background stay the same from frame to frame. The batch is one clip, in order.",
            search_aliases=[
                "tune-a-video",
                "sparse causal attention",
                "temporal consistency",
                "text to video",
                "flicker",
                "frames",
                "animation",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An image model: SD 1.x, SD 2.x, SDXL, FLUX, Chroma, Z-Image, Lumina 2, Qwen-Image or "
                    "SD 3; not Wan or Anima, whose frames see each other already. Give the patched model to Invert "
                    "Picture as well as to the sampler, so that both walk the same path.",
                ),
                io.Combo.Input(
                    "look_at",
                    options=list(video_attention.FRAMES),
                    default="own, first and previous",
                    tooltip="The frames whose keys and values a frame sees. first and previous: as Tune-A-Video, for "
                    "which its model is trained. own, first and previous: safer on a model that is not. middle: "
                    "FateZero. all: steadiest; time and memory of attention grow with the number of frames.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(host.SELF_ATTENTION),
                    tooltip="Where in the network frames look at one another. all: as published. all but the finest: "
                    "cheaper, and detail stays each frame's own; FateZero's choice. decoder: layout stays each "
                    "frame's own. Transformers: all, or decoder, the last third of the blocks.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of what other frames give. 1: as published. Lower values mix the frame's own "
                    "attention in and run it a second time. 0: none; with temporal 0 too it is the plain model, bit "
                    "for bit.",
                ),
                *inputs.percents(
                    start="When frames begin to look at one another, as a share of the sampling. 0: from the first "
                    "step, which lays out colours.",
                    end="When they stop. 1: at the last step. 0.7 to 0.9 leave the finest detail of moving things "
                    "to each frame.",
                    advanced=True,
                ),
                io.Float.Input(
                    "temporal",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of attention over time: a place looks at the same place of all frames. 0: none. "
                    "0.3 to 0.6 steadies colours, with strength or without; near 1 smears what moves, as nothing is "
                    "trained for it. U-Nets only.",
                ),
                io.Int.Input(
                    "clip_length",
                    default=0,
                    min=0,
                    max=4096,
                    step=1,
                    advanced=True,
                    tooltip="Frames of a clip, where the batch holds several clips of equal length, one after "
                    "another; each looks at its own frames only. 0: the whole batch is one clip.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model that draws a batch as one clip. The sampled batch must be whole clips; a "
                    "single picture comes out as from the plain model, bit for bit."
                )
            ],
        )

    @classmethod
    def execute(cls, model, **chosen) -> io.NodeOutput:
        return io.NodeOutput(video_attention.apply(model, video_attention.VideoSettings.of(chosen)))


NODES = [VideoAttention]
