"""Pictures as words (MUMU), and their training."""

from __future__ import annotations

import os

from comfy_api.latest import io

from .. import host, inputs, sockets
from . import files, prompting
from .dataset import nodes as dataset_nodes
from .encoder import describe_encoder
from .interleaved import MOST_PICTURES
from .loading import NONE, PERCEIVER, EncoderSettings, load_encoder
from .training import nodes as training_nodes
from .vlm import DTYPES


class LoadMultimodalEncoder(io.ComfyNode):
    """Read a vision-language model and its connector."""

    @classmethod
    @inputs.completed("folder")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadMultimodalEncoder",
            display_name="Load Multimodal Encoder",
            category="palimpsest/multimodal",
            description="Loads a vision-language model (Idefics2, Idefics3, SmolVLM, Qwen2.5-VL, Qwen3-VL) from a "
            "folder on this machine, and the trained connector that makes prompts for SD 1.5 or SDXL of what it "
            "sees and reads.",
            search_aliases=["mumu", "idefics2", "smolvlm", "qwen", "vlm", "image prompt", "multimodal"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=files.encoder_folders(),
                    tooltip="A model folder in models/palimpsest_encoders, with config.json, tokenizer and "
                    ".safetensors weights; nothing is downloaded. Refresh (R) lists new ones.",
                ),
                io.Combo.Input(
                    "connector",
                    options=[NONE, *files.listed()],
                    tooltip="A connector in models/palimpsest_connectors, trained on this model and for the family of "
                    "your checkpoint. none (default): for training one; it cannot prompt yet.",
                ),
                io.Combo.Input(
                    "perceiver",
                    options=list(PERCEIVER),
                    advanced=True,
                    tooltip="Idefics2 only. bypassed: as many tokens a picture as you choose; the paper takes 324 and "
                    "1296. kept: 64 tokens, which the paper found too few for details. as trained (default): what the "
                    "connector learned with; bypassed without one.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    advanced=True,
                    tooltip="Precision of the vision-language model. auto (default): bfloat16 where the GPU has it. "
                    "float32 doubles its memory.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *files.lora_files()],
                    advanced=True,
                    tooltip="A LoRA of the vision-language model itself, from models/loras, as Train Multimodal "
                    "Encoder writes beside the connector. none (default): the model as it is. One for the U-Net "
                    "belongs in Load LoRA.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How much of the LoRA is added. 1 (default): as it was trained; 0 leaves it out.",
                ),
            ],
            outputs=[
                sockets.MultimodalEncoder.Output(
                    display_name="multimodal_encoder",
                    tooltip="For Multimodal Prompt, or to train a connector. The host moves it in and out of the GPU "
                    "as it does text encoders.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was loaded: family, size, precision, tokens a picture, and what the connector was "
                    "trained for.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def validate_inputs(cls, folder=None) -> bool | str:
        """Say what to do while there is no folder; a list of names cannot."""
        if folder == files.NO_FOLDER:
            return (
                "models/palimpsest_encoders is empty: put the folder of a vision-language model there, such as "
                "Idefics2 or SmolVLM (config.json, tokenizer, .safetensors), and refresh."
            )
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, connector=NONE, lora=NONE, **_) -> str:
        """Read again when a file changed."""
        import folder_paths

        parts = {files.SHELF.folder: connector, "loras": lora}
        chosen = [folder_paths.get_full_path(kind, name) for kind, name in parts.items() if name != NONE]
        if folder in files.ENCODERS.found():
            chosen += sorted(str(path) for path in files.ENCODERS.path(folder).glob("*.*"))
        there = [path for path in chosen if path and os.path.exists(path)]  # a link may lead nowhere
        return " ".join(f"{path} {os.path.getmtime(path)}" for path in there)

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        encoder = load_encoder(EncoderSettings.of(chosen))
        report = describe_encoder(encoder)
        return io.NodeOutput(encoder, report, ui=host.told(cls, report))


class MultimodalPrompt(io.ComfyNode):
    """MUMU's prompts (arXiv:2406.18790): a <image1> man and his <image2> dog."""

    @classmethod
    @inputs.completed("text")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestMultimodalPrompt",
            display_name="Multimodal Prompt",
            category="palimpsest/multimodal",
            description="Makes a prompt of words and pictures: 'a <image1> dog in the snow' draws that dog, in the "
            "snow. Sample with its model, positive and negative.",
            search_aliases=[
                "mumu",
                "image prompt",
                "picture in prompt",
                "style from picture",
                "multimodal",
                "ip-adapter",
                "reference",
                "style",
                "subject",
                "consistent character",
                "face",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint that samples, of the family that the connector was trained for; LoRAs and "
                    "patches are kept.",
                ),
                sockets.MultimodalEncoder.Input(
                    "multimodal_encoder", tooltip="From Load Multimodal Encoder, with a connector."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a <image1> dog sitting in the snow",
                    dynamic_prompts=False,
                    tooltip="The prompt, with <image1>, <image2>, ... (or {image1}) before the word each picture "
                    "shows. <image1:0.7> weakens a picture, <image1, tokens=1296> shows more of it. 'Picture 1' works, "
                    "too, where nothing stands in brackets.",
                ),
                io.String.Input(
                    "negative_text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="What to stay away from; it may hold pictures, too. Empty (default) is what MUMU was "
                    "trained and shown with.",
                ),
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplateNames(
                        io.Image.Input("image", tooltip="One picture, of any size and shape."),
                        names=[f"image{i}" for i in range(1, MOST_PICTURES + 1)],
                        min=0,
                    ),
                    tooltip="The pictures, image1 for <image1> and so on, one each. They are padded to squares with "
                    "black; a subject that fills its picture is seen best.",
                ),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplateNames(
                        io.Mask.Input("mask", tooltip="White where the subject is.", optional=True),
                        names=[f"mask{i}" for i in range(1, MOST_PICTURES + 1)],
                        min=0,
                    ),
                    optional=True,
                    tooltip="Optional: mask1 for image1 and so on, white on the subject. The picture is cut to the box "
                    "around it; see background.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Optional: the checkpoint's text encoder, for pooled_output 'CLIP text' with SDXL. It "
                    "reads the words without the pictures.",
                ),
                io.Combo.Input(
                    "tokens_per_picture",
                    options=prompting.TOKENS,
                    tooltip="How finely each picture is seen. The paper takes 324, for faces 1296, and finds that "
                    "quality saturates near 1000. Each token costs memory and time in every step. as trained "
                    "(default): what the connector learned with.",
                ),
                io.Combo.Input(
                    "background",
                    options=list(prompting.BACKGROUND),
                    tooltip="What is around a masked subject. removed (default): black, so that only the subject is "
                    "taken over; MUMU was shown such pictures. kept: as it is, within the box around the mask.",
                ),
                io.Combo.Input(
                    "pooled_output",
                    options=list(prompting.POOLED),
                    advanced=True,
                    tooltip="SDXL's second prompt, one vector. auto (default): the connector's own where it learned "
                    "one, else CLIP's where clip is connected, else zeros. CLIP text helps the words of the prompt.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, which keeps the long prompt's keys and values over the steps: a step with 1000 "
                    "tokens of SDXL then costs 4 % more than a plain one, and pictures are the same bit for bit.",
                ),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with its pictures, for any sampler, area or mask."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negative prompt, of the same length, so that both run in one batch.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Which tokens are text and which are pictures, and how many the model can read.",
                ),
                io.Image.Output(
                    display_name="seen",
                    tooltip="For Preview Image: both prompts as the encoder is given them, token by token; every "
                    "picture cut, padded and resized as it is seen, under the grid of its tokens.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, multimodal_encoder, images=None, masks=None, clip=None, **chosen) -> io.NodeOutput:
        images = inputs.grown(chosen, "images", "image", images)
        masks = inputs.grown(chosen, "masks", "mask", masks)
        settings = prompting.PromptSettings.of(chosen)
        made = prompting.prompt(model, multimodal_encoder, images, masks, settings, clip)
        given = (made.model, made.positive, made.negative, made.report, made.seen)
        return io.NodeOutput(*given, ui=host.told(cls, made.report))


SHELVES = [files.SHELF, files.ENCODERS, *dataset_nodes.SHELVES, *training_nodes.SHELVES]
NODES = [LoadMultimodalEncoder, MultimodalPrompt, *dataset_nodes.NODES, *training_nodes.NODES]
