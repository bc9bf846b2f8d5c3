"""An edit sees the source's keys and values: a new pose, the same subject."""

from __future__ import annotations

from comfy_api.latest import io

from .. import inputs, saving, sockets
from ..quoting import quoted
from .apply_node import ApplyKV
from .files import SHELF, describe_kv, load_kv, save_kv
from .tune_node import TuneKV

KEPT = saving.Kept(
    name="KV",
    id="KV",
    category="palimpsest/inversion",
    socket=sockets.KV,
    input="kv",
    shelf=SHELF,
    save=save_kv,
    load=load_kv,
    describe=describe_kv,
    made_by="Tune KV",
    used_by="Apply KV",
    filename="picture",
)


class SaveKV(io.ComfyNode):
    """Write KV embeddings to models/palimpsest_kv."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return saving.save_schema(
            KEPT,
            description="Saves tuned keys and values as a .safetensors file in models/palimpsest_kv, for Load KV.",
            search_aliases=["kv inversion", "save embeddings"],
        )

    @classmethod
    def validate_inputs(cls, filename=None) -> bool | str:
        return saving.checked(filename, SHELF.try_new)

    @classmethod
    def execute(cls, kv, filename=None) -> io.NodeOutput:
        return saving.save(cls, KEPT, kv, filename)


class LoadKV(io.ComfyNode):
    """Read KV embeddings from models/palimpsest_kv."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        noise = io.Latent.Output(
            display_name="noise",
            tooltip="The picture's inverted noise, to sample edits from without inverting again.",
        )
        return saving.load_schema(
            KEPT,
            description="Loads keys and values that Save KV wrote, so that a tuned picture can be edited again "
            "without tuning.",
            search_aliases=["kv inversion", "load embeddings"],
            more_outputs=(noise,),
        )

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return SHELF.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return saving.load(cls, KEPT, file, lambda kv: ({"samples": kv.noise.clone()},))


class PromptLines(io.ComfyNode):
    """One prompt per line, as a list: everything behind it runs once for each."""

    @classmethod
    @inputs.completed("lines")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestPromptLines",
            display_name="Prompt Lines",
            category="palimpsest/inversion",
            description="Turns each line into a prompt of its own. Nodes behind it run once for every line, so that "
            "one tuned picture is edited by many prompts in one run.",
            search_aliases=["prompt list", "prompt queue", "batch prompts", "string list"],
            inputs=[
                io.String.Input(
                    "lines",
                    multiline=True,
                    default="sitting\nlying",
                    tooltip="One prompt per line; empty lines are left out, and so are lines that begin with #.",
                ),
                io.String.Input(
                    "template",
                    default="{}",
                    tooltip="What stays the same in every prompt, with {} where the line goes: a photo of a cat {} on "
                    "grass.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompts", is_output_list=True, tooltip="A list of prompts, for CLIP Text Encode."
                )
            ],
        )

    @classmethod
    def execute(cls, lines, template="{}") -> io.NodeOutput:
        """Fill the template with every line."""
        if "{}" not in template:
            raise ValueError(
                f"template {quoted(template)} has no {{}}: write it where each line should go, or {{}} alone."
            )
        kept = [line.strip() for line in lines.splitlines()]
        prompts = [template.replace("{}", line) for line in kept if line and not line.startswith("#")]
        if not prompts:
            raise ValueError("lines holds no prompt: write one per line.")
        return io.NodeOutput(prompts)


SHELVES = [SHELF]
NODES = [TuneKV, ApplyKV, SaveKV, LoadKV, PromptLines]
