"""An edit sees the source's keys and values: a new pose, the same subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...kernels.scripts import split_lines
from .. import host, inputs, saving, sockets
from ..quoting import quoted
from .apply_node import ApplyKV
from .embeddings import KVEmbeddings
from .files import SHELF, describe_kv, load_kv, save_kv
from .recorded import RecordedKV
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
            description="Saves tuned keys and values as a .safetensors file in models/palimpsest_kv, for Load KV. Of "
            "a transformer (FLUX, Z-Image, Qwen-Image, SD 3) it saves what they are recorded from, the picture's "
            "path and its prompt, and what was learned.",
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
            tooltip="The picture's inverted noise, to sample edits from without inverting again. On flow-matching "
            "models only the latent_image beside inverted_noise.",
        )
        found = io.Noise.Output(
            display_name="inverted_noise",
            tooltip="The inverted noise for SamplerCustomAdvanced, the only way on flow-matching models (FLUX, "
            "Z-Image, Qwen-Image, SD 3). It needs model.",
        )
        model = io.Model.Input(
            "model",
            optional=True,
            tooltip="Only for inverted_noise: the model that samples the edit, with its ModelSampling node. Empty: the "
            "picture is the same, inverted_noise cannot be used.",
        )
        return saving.load_schema(
            KEPT,
            description="Loads keys and values that Save KV wrote, so that a tuned picture can be edited again "
            "without tuning.",
            search_aliases=["kv inversion", "load embeddings"],
            more_outputs=(noise, found),
            more_inputs=(model,),
        )

    @classmethod
    def fingerprint_inputs(cls, file, model=None) -> str:
        return SHELF.fingerprint(file)

    @classmethod
    def execute(cls, file, model=None) -> io.NodeOutput:
        return saving.load(cls, KEPT, file, lambda kv: ({"samples": kv.noise.clone()}, noise_of(kv, model)))


def noise_of(kv: KVEmbeddings | RecordedKV, model: Any) -> host.FoundNoise | UnfittedNoise:
    """A NOISE of the host that begins in the inverted picture. Raises ValueError for another architecture's model."""
    if model is None:
        return UnfittedNoise()
    inputs.require_same_layout(
        model,
        kv.layout,
        "the picture was inverted",
        "connect the model that it was inverted with, or leave model empty",
    )
    if isinstance(kv, RecordedKV):
        return host.FoundNoise(model, kv.trajectory.latents[0], kv.trajectory.sigmas[0])
    return host.FoundNoise(model, model.model.process_latent_in(kv.noise.clone()), kv.sigmas[0])


@dataclass(frozen=True)
class UnfittedNoise:
    """What inverted_noise is where no model is connected: a NOISE of the host that says so when it is used."""

    seed: int = 0

    def generate_noise(self, latent: dict) -> Tensor:
        """Raises ValueError."""
        raise ValueError(
            "inverted_noise of Load KV is fitted to the model that samples, and none is connected to it: connect the "
            "model to Load KV."
        )


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
        prompts = [template.replace("{}", line) for line in split_lines(lines) if not line.startswith("#")]
        if not prompts:
            raise ValueError("lines holds no prompt: write one per line.")
        return io.NodeOutput(prompts)


SHELVES = [SHELF]
NODES = [TuneKV, ApplyKV, SaveKV, LoadKV, PromptLines]
