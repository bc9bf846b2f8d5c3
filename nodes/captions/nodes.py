"""Captions for a training."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host, inputs, sockets
from ..colours import rgb
from . import beside, helping, seeing


class CaptionHelper(io.ComfyNode):
    """Captions from files or typed, of content alone, behind a trigger word."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestCaptionHelper",
            display_name="Caption Helper",
            category="palimpsest/lora",
            description="Makes captions ready for Train LoRA: takes those beside the pictures or typed ones, leaves "
            "out words of style and layout, so that the LoRA learns these, and puts the trigger word in front.",
            search_aliases=["captions", "caption files", "tagging", "dataset", "trigger word", "label", "lora", "txt"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures, as a list or a batch, such as from Load Image-Text (from Folder). They are "
                    "only shown on the sheet.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="What each picture shows, in the pictures' order: the texts of Load Image-Text (from "
                    "Folder), a line for each, or one line for all. A picture without one gets that of the folder.",
                ),
                io.Combo.Input(
                    "folder",
                    options=beside.folders(),
                    tooltip="The folder that images come from: a picture without a caption gets the .txt or .caption "
                    "file of its name. (none), default: no files are read.",
                ),
                io.Boolean.Input(
                    "drop_style",
                    default=True,
                    tooltip="On (default): words of style and layout are left out of captions, such as 'a painting "
                    "of', 'highly detailed', 'in the background': what no word claims is what the LoRA learns. Off for "
                    "a subject that should be drawn in any style.",
                ),
                io.String.Input(
                    "drop_words",
                    default="",
                    tooltip="More words or phrases to leave out, separated by commas, such as the name of the style.",
                ),
                io.String.Input(
                    "keep_words",
                    default="",
                    tooltip="Words that are not left out though they may tell a style, separated by commas: picture, "
                    "where a picture hangs on the wall.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="A rare word that is put before every caption and calls up what was learned, such as zwx. "
                    "Leave Train LoRA's own trigger empty then. Empty (default): none, which suits a style.",
                ),
                sockets.MultimodalEncoder.Input(
                    "multimodal_encoder",
                    optional=True,
                    tooltip="A vision-language model, from Load Multimodal Encoder (no connector is needed): it "
                    "describes the pictures that have no caption. Without it they get none.",
                ),
                io.String.Input(
                    "question",
                    multiline=True,
                    default=helping.QUESTION,
                    optional=True,
                    advanced=True,
                    tooltip="What the vision-language model is asked of each picture. It should name what is in it, in "
                    "one line; words of style are left out of its answer as well.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=60,
                    min=1,
                    max=500,
                    optional=True,
                    advanced=True,
                    tooltip="How long an answer may get, in tokens of the vision-language model: 30 to 80; CLIP reads "
                    "75 at once.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="captions", is_output_list=True, tooltip="A caption for each picture, for Train LoRA."
                ),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="Each picture with its caption and what was left out, to be read over.",
                ),
                io.String.Output(display_name="report", tooltip="Where the captions come from, what was left out."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, images, captions=("",), multimodal_encoder=(None,), **chosen) -> io.NodeOutput:
        """One caption a picture."""
        settings = helping.CaptionSettings.of({name: value[0] for name, value in chosen.items()})
        pictures = [picture for batch in images for picture in rgb(batch, "images").split(1)]
        shown = host.ProgressText(host.node_id(cls))
        describe = seeing.describer(multimodal_encoder[0], settings, shown.update) if multimodal_encoder[0] else None
        found = helping.captions_for(pictures, captions, settings, describe)
        report = helping.described(found)
        sheet = helping.sheet(pictures, found)
        return io.NodeOutput([caption.text for caption in found], sheet, report, ui=host.told(cls, report))


NODES = [CaptionHelper]
