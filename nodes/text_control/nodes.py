"""Exact text in its place (AnyText)."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host, inputs, sockets
from ..quoting import quoted
from . import applying, files
from .applying import ApplySettings
from .control import require_text_control
from .keeping import STATES
from .train_node import TrainTextControl


class LoadAnyText(io.ComfyNode):
    """AnyText (arXiv:2311.03054) on the host's own model: its control, its embeddings, its reader."""

    @classmethod
    @inputs.completed("file")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadAnyText",
            display_name="Load AnyText",
            category="palimpsest/text",
            description="Loads the parts of AnyText that write exact text, for any SD 1.5 checkpoint: the text control "
            "and what the text encoder is told of each line. The checkpoint's own U-Net, CLIP and VAE are left out.",
            search_aliases=["anytext", "text in image", "exact text", "write text", "lettering", "glyph", "controlnet"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.listed() or [files.NOTHING],
                    tooltip="anytext_v1.1.safetensors, its diffusers conversion, or what Train Text Control saved: in "
                    "models/palimpsest_text_control, or with anytext in its name in models/controlnet or checkpoints. "
                    "Pickled files (.ckpt) have to be converted once; AnyText2 fits no SD 1.5 checkpoint.",
                ),
                io.Combo.Input(
                    "embeddings",
                    options=[files.SAME, *files.listed()],
                    advanced=True,
                    tooltip="Where the letters' embeddings come from. (the same file) (default); another file where "
                    "the first holds the control alone, as diffusers conversions do (proj.safetensors).",
                ),
            ],
            outputs=[
                io.ControlNet.Output(display_name="control_net", tooltip="For Apply Text Control."),
                sockets.TextEmbedder.Output(display_name="text_embedder", tooltip="For Text Prompt."),
                io.String.Output(display_name="report", tooltip="What the files have."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def fingerprint_inputs(cls, file, embeddings=files.SAME, **_) -> str:
        return " ".join(files.fingerprint(name) for name in (file, embeddings) if name != files.SAME)

    @classmethod
    def execute(cls, file, embeddings=files.SAME) -> io.NodeOutput:
        parts = files.read(files.path_of(file))
        if not parts.control:
            raise ValueError(f"{quoted(file)} has no control: choose it as embeddings, and a file with a control here.")
        source = parts if embeddings == files.SAME else files.read(files.path_of(embeddings))
        if not source.projection:
            raise ValueError(
                f"{quoted(file if embeddings == files.SAME else embeddings)} has no embeddings of letters: choose the "
                "file that has them as embeddings (proj.safetensors of a diffusers conversion)."
            )
        report = f"{file}: {parts.described()}"
        report += "" if source is parts else f"; {embeddings}: {source.described()}"
        report += "" if source.reader else "; PP-OCRv3's recogniser of this pack"
        told = host.told(cls, report)
        return io.NodeOutput(files.control_of(parts), files.embedder_of(source), report, ui=told)


class ApplyTextControl(io.ComfyNode):
    """AnyText's auxiliary latent (arXiv:2311.03054, eq. 2) as a ControlNet on the prompts."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestApplyTextControl",
            display_name="Apply Text Control",
            category="palimpsest/text",
            description="Lets the sampler write the lines where they stand: into a new picture, or into a photo whose "
            "text is taken out first.",
            search_aliases=["anytext", "write text", "change text", "edit text", "sign", "lettering", "controlnet"],
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="From Text Prompt: what the picture shows, and the lines in it."
                ),
                io.Conditioning.Input("negative", tooltip="What it should not show. It is told of the lines as well."),
                io.ControlNet.Input("control_net", tooltip="From Load AnyText or Train Text Control."),
                sockets.TextLines.Input(
                    "text_lines", tooltip="From Text Lines: what is written where. Its size is the picture's."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the SD 1.5 checkpoint that samples."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How firmly letters and places are held to. 1 (default): as trained; 0.7 to 1.2. Less "
                    "bends letters into the picture's style, more cuts them hard. 0: not at all.",
                ),
                *inputs.percents(
                    start="Share of the sampling before which nothing is written. 0 (default): letters stand from the "
                    "first step; later they hardly come right.",
                    end="Share of the sampling after which the model finishes alone. 1 (default); 0.8 lets the style "
                    "of a LoRA into the strokes.",
                    advanced=True,
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="New pictures drawn at once, of one seed. With a picture connected: one for each of its.",
                ),
                io.Boolean.Input(
                    "keep_rest",
                    default=False,
                    tooltip="With a picture. Off (default), as AnyText: all of it is drawn anew, led by what is around "
                    "the text. On: only the lines' places are noised and drawn; what is around stays its latent.",
                ),
                io.Image.Input(
                    "picture",
                    optional=True,
                    tooltip="A photo to change the text of, of the size of text_lines: the lines' places are blanked. "
                    "Without: a new picture.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="With the control, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="With the same control."),
                io.Latent.Output(display_name="latent", tooltip="For the sampler, at denoise 1."),
                io.Mask.Output(display_name="mask", tooltip="The lines' places, for Keep Outside."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, control_net, text_lines, vae, picture=None, **chosen) -> io.NodeOutput:
        require_text_control(control_net)
        settings = ApplySettings.of(chosen)
        host.require_span(settings.start_percent, settings.end_percent)
        latent = applying.start_of(vae, text_lines, picture, settings)
        if settings.strength > 0:
            percents = settings.start_percent, settings.end_percent
            hint = applying.hint_of(vae, text_lines, picture)
            control = control_net.with_hint(hint, settings.strength, percents)
            positive, negative = applying.attached(control, positive, negative)
        return io.NodeOutput(positive, negative, latent, text_lines.positions.float())


NODES = [LoadAnyText, ApplyTextControl, TrainTextControl]
SHELVES = [files.CONTROLS, STATES]
