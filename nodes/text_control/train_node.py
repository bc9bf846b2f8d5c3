"""The node that trains a text control on pictures with text."""

from __future__ import annotations

import time

from comfy_api.latest import io

from ...kernels.lora import CONSTANT, SCHEDULES
from .. import exact_text, host, inputs, sockets
from ..exact_text import TextEmbedder
from ..training import states, watched
from ..training.course import plot
from ..training.fitting import History
from ..training.widgets import shared
from . import course, dataset, examples, files, keeping, training
from .control import require_text_control
from .settings import TrainSettings

NAME = "my_text_control"


class TrainTextControl(io.ComfyNode):
    """AnyText's training (arXiv:2311.03054, section 3): control and embeddings, the U-Net frozen."""

    @classmethod
    @inputs.completed("folder")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTrainTextControl",
            display_name="Train Text Control",
            category="palimpsest/text",
            description="Teaches exact text: a control and the letters' embeddings learn from a folder of pictures "
            "whose lines are written down, while the model stays as it is. Begin from AnyText, or anew.",
            search_aliases=["anytext", "train text", "train controlnet", "ocr", "fine-tune", "lettering", "font"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD 1.x model, which itself stays as it is. LoRAs on it are taken as a part of it.",
                ),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder; it stays as it is, too."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE, for the pictures and the sheet."),
                io.Combo.Input(
                    "folder",
                    options=dataset.listed(),
                    tooltip="A folder of input/palimpsest_texts with pictures and texts.jsonl: for each picture a line "
                    "with its caption, and the text and corners of the lines in it. The help page has the format.",
                ),
                io.Int.Input(
                    "steps",
                    default=10000,
                    min=1,
                    max=10_000_000,
                    tooltip="Steps of the optimiser in all. Go on from AnyText where you can: from nothing its authors "
                    "took 3 million pictures and 312 hours on eight A100 GPUs. Look at the sheet and stop early.",
                ),
                shared(
                    "batch_size",
                    "Pictures in one step, of one size. More learns steadier and takes more memory.",
                    default=2,
                ),
                shared(
                    "accumulation",
                    "Adds up the gradients of so many batches: 3 (default) of 2 are AnyText's 6, without their memory.",
                    default=3,
                    advanced=None,
                ),
                shared(
                    "learning_rate",
                    "0.00002 (default) is AnyText's; up to 0.0001 for a new control. Too high: letters fall "
                    "apart, colours burn.",
                    default=0.00002,
                ),
                shared(
                    "resolution",
                    "Side in pixels of a square of as many pixels as each picture gets; its proportions stay. "
                    "512 (default) is SD 1.5's. Lines should be 20 pixels high by then.",
                    default=512,
                    min=64,
                    max=2048,
                ),
                io.Float.Input(
                    "blank_share",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the pictures that are shown without their text alone, so that photos can be "
                    "edited; the others are shown nothing, for new pictures. 0.5 (default) is AnyText's.",
                ),
                io.Float.Input(
                    "reading_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Above 0, what a recogniser sees of the drawn letters counts as well (AnyText: 0.003 to "
                    "0.01, in the last part of a training): sharper letters, for more time and much more memory.",
                ),
                io.Combo.Input(
                    "font",
                    options=exact_text.font_names(),
                    default=exact_text.BUILT_IN,
                    tooltip="In which lines are drawn for the network. It needs every letter of your texts; take the "
                    "same one in Text Lines later.",
                ),
                inputs.seed(
                    "Sets the first weights, the noise and the order of the pictures. The same seed gives the same "
                    "file.",
                    control_after_generate=True,
                ),
                io.String.Input(
                    "filename",
                    default=NAME,
                    tooltip="Name of the file in models/palimpsest_text_control, for Load AnyText; a number is added, "
                    "and the step to files on the way.",
                ),
                io.Int.Input(
                    "save_every",
                    default=1000,
                    min=0,
                    max=10_000_000,
                    tooltip="Keeps a file after so many steps, of 0.7 GB for SD 1.5. 0: only the last.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=1000,
                    min=0,
                    max=10_000_000,
                    tooltip="After so many steps the texts of the first two pictures are drawn anew, from the same "
                    "noise, and read on the sheet. 0: never.",
                ),
                shared(
                    "checkpointing",
                    "On (default): blocks run again for the gradient instead of being kept: far less memory, "
                    "more time, the same result.",
                ),
                io.Combo.Input(
                    "resume",
                    options=states.resumable(keeping.STATES),
                    tooltip="A training to go on with, from models/palimpsest_text_control_states: with the same "
                    "pictures and settings it ends as if it had never been stopped. steps may be more than before.",
                ),
                shared("guidance", "Guidance (cfg) of the previews. 9 (default) is AnyText's.", default=9.0),
                shared(
                    "optimiser",
                    "AdamW (default), or its 8-bit form, which saves 2 GB here and needs the package "
                    "bitsandbytes or torchao; without them AdamW is used and the report says so.",
                    advanced=True,
                ),
                shared(
                    "schedule",
                    "How the learning rate goes: constant (default, AnyText's), or falling to 0 at the end.",
                    options=[CONSTANT, *(name for name in SCHEDULES if name != CONSTANT)],
                    advanced=True,
                ),
                shared("warm_up", "Steps in which the learning rate rises from 0: 100 to 500 steady a high rate."),
                shared("weight_decay", "Draws the weights towards zero. 0.01 (default) is AdamW's own."),
                shared(
                    "keep_state",
                    "last (default): the end, or a cancelled training, can be gone on with; its file is some "
                    "six times the control's. with every file: each of them. none.",
                ),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="From Load AnyText, to go on from. Without: a new one, begun from the model's own U-Net.",
                ),
                sockets.TextEmbedder.Input(
                    "text_embedder",
                    optional=True,
                    tooltip="From Load AnyText, to go on from. Without: new embeddings.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(display_name="control_net", tooltip="For Apply Text Control."),
                sockets.TextEmbedder.Output(display_name="text_embedder", tooltip="For Text Prompt."),
                io.Image.Output(display_name="plot", tooltip="The training loss, and the loss by noise level."),
                io.Image.Output(display_name="sheet", tooltip="What the previews wrote, and what is read there."),
                io.String.Output(display_name="report", tooltip="Steps, loss, readings, time, files."),
                io.String.Output(display_name="file", tooltip="The name to pick in Load AnyText."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        folder,
        filename=NAME,
        resume=states.NEW,
        control_net=None,
        text_embedder=None,
        **chosen,
    ) -> io.NodeOutput:
        settings, began = TrainSettings.of(chosen), time.monotonic()
        if control_net is not None:
            require_text_control(control_net)
        shown = host.ProgressText(host.node_id(cls))
        texts = dataset.read_texts(folder)
        learning = training.begin(model, clip, control_net, text_embedder, settings)
        state = states.load_state(keeping.STATES, resume, settings, keeping.free_settings(settings))
        recogniser = text_embedder.recogniser if text_embedder else exact_text.shipped_recogniser()
        layout = learning[0].network.layout
        target = keeping.TrainingFiles.new(filename, settings, layout, recogniser)
        target.require_room(sum(t.numel() for each in learning for t in each.parameters()))
        reader = examples.Reader(recogniser)
        found = list(examples.examples(model, vae, texts, reader, settings, lambda text: shown.update(text, now=False)))

        watch = watched(model, settings.steps, shown.update, target.save)
        more = {"settings": settings, "reader": reader, "watch": watch, "state": state}
        history = training.train(model, clip, vae, found, learning, **more)
        sheet, told = course.sheet(model, vae, history, found)
        report = describe(history, found, told, target.written, time.monotonic() - began)
        report += host.guidance_left_out(model)
        parts = keeping.parts_of(dict(zip(("control", "embeddings"), learning, strict=True)), layout)
        control, projection = files.control_of(parts), parts.projection
        shown_files = host.told(cls, report, saved=target.written)
        return io.NodeOutput(
            control,
            TextEmbedder(recogniser, projection),
            plot(history),
            sheet,
            report,
            target.written[-1],
            ui=shown_files,
        )


def describe(history: History, found: list, told: str, written: list[str], seconds: float) -> str:
    """From how many lines the control learned, how well, and where it went."""
    parts = [
        history.counted(),
        f"{len(found)} pictures, {sum(len(example.lines) for example in found)} lines",
        history.fallen(),
        told,
        history.optimiser,
        history.stopped,
        f"{seconds:.0f} s; {', '.join(written)}",
    ]
    return "; ".join(filter(None, parts))
