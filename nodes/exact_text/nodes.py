"""Exact text for pictures, read back."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .. import host, inputs, sockets
from ..colours import rgb
from . import building, drawing, fonts, places, prompting, reading

BOXES = io.Custom("BOUNDING_BOX")  # the host's; its own class comes with a widget in some versions
GREY = 0.5  # of a picture that is not there yet


def order_input(tooltip: str) -> io.Combo.Input:
    """Which place is which line's."""
    return io.Combo.Input("order", options=list(places.ORDERS), default=places.DOWN, tooltip=tooltip)


class TextLinesNode(io.ComfyNode):
    """Say what is written where."""

    @classmethod
    @inputs.completed("lines")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTextLines",
            display_name="Text Lines",
            category="palimpsest/text",
            description="Draws lines of text into their places, by a mask, by boxes or down the middle: what networks "
            "that write exact text into pictures (AnyText) are shown, and a preview for you.",
            search_aliases=[
                "anytext",
                "draw text",
                "write text",
                "text on picture",
                "text overlay",
                "sign",
                "caption",
                "glyph",
                "font",
                "typography",
                "lettering",
                "add text",
            ],
            inputs=[
                io.String.Input(
                    "lines",
                    multiline=True,
                    default="EXACT TEXT",
                    tooltip="The text, one line in each row, letter for letter. AnyText was trained with up to 5 lines "
                    "of up to 20 letters; more are drawn, and the report says so.",
                ),
                io.Combo.Input(
                    "font",
                    options=fonts.listed(),
                    default=fonts.BUILT_IN,
                    tooltip=f"The letters' form. Your fonts go into models/{fonts.FOLDER}; the system's are listed, "
                    "too. Chinese needs a font that has it: a letter that is missing is named, not drawn as a box.",
                ),
                order_input(
                    "Which place is which line's. top to bottom reads like a page, left to right like columns; as "
                    "given takes boxes, or several masks, one by one."
                ),
                io.Combo.Input(
                    "direction",
                    options=list(places.DIRECTIONS),
                    default=places.BY_PLACE,
                    tooltip="by the place: along its longer side, slanted as it is, and downwards where it stands "
                    "upright. level and downwards write in the level box around it.",
                ),
                io.Float.Input(
                    "size",
                    default=0.8,
                    min=0.1,
                    max=1.0,
                    step=0.01,
                    tooltip="How large letters are: their em as a share of the place's short side. AnyText's is 0.8. "
                    "A line that would be too long is made smaller.",
                ),
                io.Float.Input(
                    "spacing",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How far letters are spread over a place that is longer than its line. 1 fills it, as "
                    "AnyText was trained; 0 sets them close, in the middle.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Width in pixels of the picture that will be drawn, where no image is connected.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Height in pixels of the picture that will be drawn, where no image is connected.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that is written on. Its size is taken; it is not changed.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the lines go: each white part is one line's place, of any form. Of several masks "
                    "each is a line's. Without mask and bboxes lines stand in rows down the middle.",
                ),
                BOXES.Input(
                    "bboxes",
                    optional=True,
                    extra_dict={"forceInput": True},  # the editor would send a box of its own where none is connected
                    tooltip="Where the lines go, as boxes in pixels of the picture: one for each.",
                ),
            ],
            outputs=[
                sockets.TextLines.Output(
                    display_name="text_lines", tooltip="The lines, for Text Prompt, Apply Text Control and Read Text."
                ),
                io.Image.Output(
                    display_name="glyphs", tooltip="The lines in their places, white on black, at twice the size."
                ),
                io.Mask.Output(display_name="positions", tooltip="The places, filled: where the picture may change."),
                io.Image.Output(display_name="preview", tooltip="The lines drawn over the picture, with their places."),
                io.String.Output(
                    display_name="report", tooltip="Which line stands where, how large, and what is unusual about it."
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, image=None, mask=None, bboxes=None, **chosen) -> io.NodeOutput:
        settings = building.LinesSettings.of(chosen)
        size = (settings.height, settings.width) if image is None else tuple(image.shape[1:3])
        built = building.build(settings, size, mask, bboxes)
        pictures = built.made.glyphs.new_full((1, *size, 3), GREY) if image is None else rgb(image, "image").cpu()
        preview = drawing.preview(pictures.float(), built.made.glyphs, built.made.lines)
        report = building.report(built, settings)
        made = built.made
        shown = ui.PreviewImage(preview, cls=cls if cls.hidden else None).as_dict() | host.told(cls, report)
        white = made.glyphs[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(made, white, made.positions, preview, report, ui=shown)


class TextPrompt(io.ComfyNode):
    """Tell a text encoder what lines look like."""

    @classmethod
    @inputs.completed("text")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTextPrompt",
            display_name="Text Prompt",
            category="palimpsest/text",
            description="Encodes a prompt whose lines in double quotes are told to the text encoder by their look "
            "instead of their letters, as AnyText does.",
            search_aliases=[
                "anytext",
                "clip text encode",
                "text in picture",
                "glyph",
                "sign",
                "quoted text",
                "spell",
                "prompt",
            ],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder of SD 1.5, with a LoRA if you use one: its text encoder part changes how "
                    "lines are read; load it with strength_clip 0 where they come out worse.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default='a photo of a shop with a sign that says "EXACT TEXT"',
                    dynamic_prompts=True,
                    tooltip="The whole prompt, every line of Text Lines in double quotes, letter for letter, in any "
                    'order. Weights work around them: ("OPEN":1.2).',
                ),
                sockets.TextLines.Input("text_lines", tooltip="The lines, from Text Lines."),
                sockets.TextEmbedder.Input(
                    "text_embedder",
                    tooltip="What makes tokens of their look, from Load AnyText: it belongs to its ControlNet.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded prompt, for Apply Text Control."),
                io.String.Output(
                    display_name="prompt", tooltip="The prompt with * for each line, as the text encoder reads it."
                ),
                io.String.Output(display_name="report", tooltip="The prompt, and which line stands for which *."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, clip, text, text_lines, text_embedder) -> io.NodeOutput:
        found = prompting.encode(clip, text, text_lines, text_embedder)
        report = prompting.report(found)
        return io.NodeOutput(found.conditioning, found.prompt, report, ui=host.told(cls, report))


class ReadText(io.ComfyNode):
    """Read what stands in a picture."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestReadText",
            display_name="Read Text",
            category="palimpsest/evaluate",
            description="Reads the text in places of a picture (OCR by PP-OCRv3, English and Chinese, which comes with "
            "the pack), and says how near it comes to the text that was wanted.",
            search_aliases=[
                "ocr",
                "recognize text",
                "text recognition",
                "image to text",
                "extract text",
                "anytext",
                "spelling",
                "check text",
                "accuracy",
                "ned",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or several with text in the same places."),
                io.String.Input(
                    "wanted",
                    multiline=True,
                    default="",
                    tooltip="What should stand there, a line for each place; empty takes the lines of text_lines, or "
                    "compares nothing.",
                ),
                io.Combo.Input(
                    "compare",
                    options=list(reading.COMPARE),
                    default=reading.EXACTLY,
                    tooltip="What counts as the same text: every letter, or also what differs in capitals or spaces.",
                ),
                order_input("In which order the places of a mask or of bboxes are read."),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-256,
                    max=256,
                    advanced=True,
                    tooltip="Reads this many pixels more around each place, or fewer below 0. Try 2 to 8 where letters "
                    "are cut off.",
                ),
                sockets.TextLines.Input(
                    "text_lines",
                    optional=True,
                    tooltip="The lines that were drawn, from Text Lines: their places are read and their text is "
                    "what was wanted.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where text stands: each white part is one line. Without any place the whole picture is "
                    "read as one line.",
                ),
                BOXES.Input(
                    "bboxes",
                    optional=True,
                    extra_dict={"forceInput": True},
                    tooltip="Where text stands, as boxes in pixels, one for each line.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What was read, a line for each place."),
                io.String.Output(display_name="report", tooltip="The same, with how sure each is and what was wanted."),
                io.Float.Output(
                    display_name="exact", tooltip="Share of the places whose text is the wanted one. NaN without one."
                ),
                io.Float.Output(
                    display_name="ned",
                    tooltip="How near the text comes to the wanted one: 1 is the same, 0 has nothing of it. NaN "
                    "without one.",
                ),
                io.Float.Output(
                    display_name="confidence", tooltip="How sure the reader is, from 0 to 1, the mean over all places."
                ),
                io.String.Output(display_name="numbers", tooltip="Everything as JSON, place by place."),
                io.Image.Output(display_name="picture", tooltip="The picture with its places and what was read there."),
            ],
            hidden=inputs.unique_id(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, text_lines=None, mask=None, bboxes=None, **chosen) -> io.NodeOutput:
        settings = reading.ReadSettings.of(chosen)
        pictures = rgb(image, "image").float().cpu().clamp(0, 1)
        size = tuple(pictures.shape[1:3])
        lines = reading.lines_to_read(size, text_lines, mask=mask, boxes=bboxes, order=settings.order)
        wanted = reading.wanted_texts(settings, text_lines, len(lines))
        found = [reading.read(picture, lines, wanted, settings) for picture in pictures]
        shown = reading.shown(pictures, lines, found)
        report, numbers = reading.report(found), reading.figures(found)
        told = ui.PreviewImage(shown, cls=cls if cls.hidden else None).as_dict() | host.told(cls, report)
        text = "\n".join(each.text for read in found for each in read)
        means = (numbers[name] for name in ("exact", "ned", "confidence"))
        return io.NodeOutput(text, report, *means, reading.as_json(found), shown, ui=told)


SHELVES = [fonts.FontFolders()]
NODES = [TextLinesNode, TextPrompt, ReadText]
