"""A language model says what an instruction means here (MGIE)."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host, inputs, sockets
from ..multimodal import DTYPES
from . import edit, express, heads, loading
from .folder import MGIE, NO_FOLDER, fingerprint, mgie_folders
from .wording import QUESTION


class ExpressInstruction(io.ComfyNode):
    """From a picture and an instruction to a text that says how the picture will be."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestExpressInstruction",
            display_name="Express Instruction",
            category="palimpsest/instruction",
            description="A language model looks at the picture and says what an instruction means for it: 'make it "
            "winter' becomes what the picture will show. Read the text, change it in Edit Instruction, and edit by it.",
            search_aliases=[
                "mgie",
                "instruct pix2pix",
                "instruction edit",
                "edit by text",
                "llava",
                "vlm",
                "caption",
                "prompt enhancer",
                "qwen-vl",
            ],
            inputs=[
                io.Image.Input("image", tooltip="What is to be edited, of any size; a batch gets a text a picture."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default=express.WINTER,
                    dynamic_prompts=False,
                    tooltip="What is to be done, short or vague: the model sees the picture. A line for all pictures, "
                    "or a line for each of a batch.",
                ),
                io.Int.Input(
                    "summary_words",
                    default=32,
                    min=0,
                    max=300,
                    tooltip="A longer text is summarised by the same model, to so many words at most. 32 (default) is "
                    "MGIE's length and fits SD's text encoder; 0 leaves it as it is. MGIE's own model needs none.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=96,
                    min=8,
                    max=2048,
                    advanced=True,
                    tooltip="Where an answer is cut off. 96 (default) is MGIE's; more for models that think aloud.",
                ),
                io.String.Input(
                    "question",
                    multiline=True,
                    default=QUESTION,
                    dynamic_prompts=False,
                    advanced=True,
                    tooltip="What the model is asked, {instruction} in it. The default is MGIE's. For others 'Answer "
                    "in one sentence that describes the new picture.' behind it helps.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="One of three: a text encoder that sees and writes (Qwen3-VL, Qwen3.5, Gemma 3 or 4 by "
                    "Load CLIP). A model that does not see the picture is refused.",
                ),
                sockets.MultimodalEncoder.Input(
                    "multimodal_encoder",
                    optional=True,
                    tooltip="One of three: a vision-language model of Load Multimodal Encoder, connector none.",
                ),
                sockets.EditHead.Input(
                    "mgie",
                    optional=True,
                    tooltip="One of three: MGIE's own model of Load MGIE, which its edit head can read.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="expressed",
                    tooltip="The text, a line a picture, for Edit Instruction, Select Words or any prompt.",
                ),
                sockets.EditHead.Output(
                    display_name="edit_head",
                    tooltip="With mgie: its edit head, and what the model meant by these pictures. Else nothing.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Every text that was sent, every answer, and what was kept of it."
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, image, clip=None, multimodal_encoder=None, mgie=None, **chosen) -> io.NodeOutput:
        settings = express.ExpressSettings.of(chosen)
        writer = express.writer_of({"clip": clip, "multimodal_encoder": multimodal_encoder, "mgie": mgie})
        made = express.express(image, writer, settings, mgie, host.node_id(cls))
        return io.NodeOutput(made.text, made.head, made.report, ui=host.told(cls, made.report))


class EditInstruction(io.ComfyNode):
    """The prompts of both guidances of InstructPix2Pix (arXiv:2211.09800)."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestEditInstruction",
            display_name="Edit Instruction",
            category="palimpsest/instruction",
            description="Makes prompts of an expressed instruction for InstructPix2Pix models: with the text, without, "
            "and one to stay without the picture. Write your own text to change what the language model said.",
            search_aliases=[
                "mgie",
                "instruct pix2pix",
                "ip2p",
                "instruction edit",
                "dual guidance",
                "edit prompt",
                "edit head",
            ],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="Empty (default): what is connected to expressed. What you write stands in its place, a "
                    "line for all pictures or for each; the language model is then not run again.",
                ),
                io.Combo.Input(
                    "route",
                    options=[edit.TEXT, edit.HEAD],
                    tooltip="expressed text (default): the checkpoint's clip reads it; any InstructPix2Pix model. edit "
                    "head: MGIE's own reads what its language model meant, for MGIE's U-Net.",
                ),
                io.String.Input(
                    "expressed",
                    optional=True,
                    force_input=True,
                    lazy=True,
                    tooltip="From Express Instruction. Asked for only while text is empty.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="For route expressed text: the text encoder of the checkpoint."
                ),
                sockets.EditHead.Input(
                    "edit_head",
                    optional=True,
                    lazy=True,
                    tooltip="For route edit head: edit_head of Express Instruction. Of another text than its own the "
                    "language model's states are read again.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The text, for positive of InstructPixToPixConditioning, and on as cond1 of Dual CFG "
                    "Guider.",
                ),
                io.Conditioning.Output(
                    display_name="without_text",
                    tooltip="No text, for negative of InstructPixToPixConditioning, and on as cond2 of Dual CFG "
                    "Guider.",
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="No text and no picture: straight to negative of Dual CFG Guider, past "
                    "InstructPixToPixConditioning.",
                ),
                io.String.Output(display_name="report", tooltip="The text that acts, and what reads it."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def check_lazy_status(cls, text="", route=edit.TEXT, **connected) -> list[str]:
        """What is to be run first, of what is connected: the language model only where what it says counts."""
        wanted = "edit_head" if route == edit.HEAD else "" if (text or "").strip() else "expressed"
        return [name for name, value in connected.items() if name == wanted and value is None]

    @classmethod
    def execute(cls, expressed=None, clip=None, edit_head=None, **chosen) -> io.NodeOutput:
        made = edit.edit(edit.EditSettings.of(chosen), clip, expressed, edit_head)
        outputs = (made.positive, made.without_text, made.without_text, made.report)
        return io.NodeOutput(*outputs, ui=host.told(cls, made.report))


class LoadMGIE(io.ComfyNode):
    """Read MGIE's U-Net, edit head and language model."""

    @classmethod
    @inputs.completed("folder")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadMGIE",
            display_name="Load MGIE",
            category="palimpsest/instruction",
            description="Loads MGIE from a folder on this machine: the U-Net that edits, the language model that says "
            "what an instruction means, and the edit head between them.",
            search_aliases=["mgie", "llava", "instruct pix2pix", "apple", "instruction edit", "ml-mgie"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=mgie_folders(),
                    tooltip="A folder in models/palimpsest_mgie, converted from the published files as the help page "
                    "says; nothing is downloaded. Refresh (R) lists new ones.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    advanced=True,
                    tooltip="Precision of the language model. auto (default): bfloat16 where the GPU has it. float32 "
                    "doubles its memory.",
                ),
                io.Combo.Input(
                    "head_file",
                    options=[heads.OF_FOLDER, *heads.HEADS.listed()],
                    optional=True,
                    tooltip="The edit head: the folder's own (default), or one that Train Instruction made with this "
                    "folder's language model, in models/palimpsest_edit_heads.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The U-Net: an InstructPix2Pix model of 8 channels, as the host knows them, for a sampler.",
                ),
                sockets.EditHead.Output(
                    display_name="edit_head",
                    tooltip="For mgie of Express Instruction. The language model is read when it is first asked.",
                ),
                io.String.Output(display_name="report", tooltip="What the folder holds, and how large it is."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def validate_inputs(cls, folder=None) -> bool | str:
        """Say what to do while there is no folder; a list of names cannot."""
        if folder == NO_FOLDER:
            return (
                "models/palimpsest_mgie is empty: put a folder with MGIE there, converted as the help page of Load "
                "MGIE says, and refresh."
            )
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, head_file=heads.OF_FOLDER, **_) -> str:
        """Read again when a file changed."""
        own = head_file in (None, heads.OF_FOLDER)
        return fingerprint(folder) + ("" if own else f" {heads.HEADS.fingerprint(head_file)}")

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        made = loading.load(loading.MgieSettings.of(chosen))
        model = made.model if made.model is not None else blocked(made.head.name)
        return io.NodeOutput(model, made.head, made.report, ui=host.told(cls, made.report))


def blocked(name: str) -> object:
    """What stands in the place of a MODEL that a folder has not: who is given it says why it does not run."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(
        f"{name} has no unet.safetensors: put MGIE's U-Net there, or load an InstructPix2Pix checkpoint for model."
    )


SHELVES = [MGIE, heads.HEADS]
NODES = [LoadMGIE, ExpressInstruction, EditInstruction]
