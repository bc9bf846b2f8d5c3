"""Words of a prompt for other nodes: phrases, `cat#2`, `paint*`, embeddings."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host, inputs, sockets
from .selection import select


class SelectWords(io.ComfyNode):
    """Encode a prompt and note which of its tokens some words are."""

    @classmethod
    @inputs.completed("text", "words")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSelectWords",
            display_name="Select Words",
            category="palimpsest/regions",
            description="Encodes a prompt and chooses words of it, so that other nodes can say where these words act, "
            "or show where they do.",
            search_aliases=[
                "token positions",
                "prompt words",
                "cross attention",
                "attention map",
                "regional prompt",
                "token",
                "phrase",
            ],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder of the model that samples: SD 1.x, SD 2.x, SDXL, SD 3, FLUX, Z-Image, "
                    "Qwen-Image, Wan, Anima and others, with CLIP skip or a LoRA if you use one.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red cat standing in the snow",
                    dynamic_prompts=True,
                    tooltip="The whole prompt, as for CLIP Text Encode: weights, embeddings and long prompts all work. "
                    "It is the text that is drawn.",
                ),
                io.String.Input(
                    "words",
                    default="cat",
                    tooltip="Words or phrases of the prompt, separated by commas; capitals and punctuation do not "
                    "count. cat#2 is the second cat, paint* any word that begins so, 'red *' means red and the word "
                    "after it, * alone every word except those like a, the, of.",
                ),
            ],
            outputs=[
                sockets.Tokens.Output(
                    display_name="tokens",
                    tooltip="The chosen words, for Cross-Attention Mask, Attention Map and Find Words in Picture. "
                    "They are recognised wherever the conditioning beside them is sampled.",
                ),
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The encoded prompt, the same as CLIP Text Encode gives. Sample with this one: it is how "
                    "the chosen words are found again.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The prompt as the text encoder reads it, with the chosen words in brackets, and the "
                    "numbers of their tokens.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, clip, text, words) -> io.NodeOutput:
        chosen, positive, report = select(clip, text, words)
        return io.NodeOutput(chosen, positive, report, ui=host.told(cls, report))


NODES = [SelectWords]
