"""The prompt bends the path from noise to picture (ContextDiff)."""

from __future__ import annotations

from functools import partial

import comfy.samplers
from comfy_api.latest import io

from .. import inputs, saving, sockets
from . import files
from .adapter import describe
from .bias import FORMULAS
from .condition_node import ContextCondition
from .sampling import AS_TRAINED, MODES, ContextSampling, SamplerSettings
from .train_node import TrainContextAdapter

ADAPTERS = saving.Kept(
    name="Context Adapter",
    id="ContextAdapter",
    category="palimpsest/context",
    socket=sockets.ContextAdapter,
    input="context_adapter",
    shelf=files.SHELF,
    save=files.save_adapter,
    load=files.load_adapter,
    describe=describe,
    made_by="Train Context Adapter",
    used_by="the Context-Aware Sampler or Train Context Adapter",
    filename="context",
)


class ContextSampler(io.ComfyNode):
    """ContextDiff's sampling (arXiv:2402.16627, eq. 7 and 11) for the host's custom sampling."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestContextSampler",
            display_name="Context-Aware Sampler",
            category="palimpsest/context",
            description="A sampler whose path from noise to picture is shifted by what a trained adapter sees in the "
            "prompt and in the picture so far, so that the picture follows its prompt closer. Connect it to "
            "SamplerCustom or SamplerCustomAdvanced.",
            search_aliases=[
                "contextdiff",
                "ddim",
                "ddpm",
                "context aware adapter",
                "prompt alignment",
                "video editing",
            ],
            inputs=[
                sockets.ContextAdapter.Input(
                    "context_adapter",
                    tooltip="From Train Context Adapter or Load Context Adapter. It must belong to the model family "
                    "that samples; an untrained one changes nothing.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="ddim (default): the same noise gives the same picture; also inverts where the noise "
                    "levels ascend. ddpm: fresh noise at every step, for 50 steps and more.",
                ),
                io.Combo.Input(
                    "formula",
                    options=[AS_TRAINED, *FORMULAS],
                    tooltip="as trained (default): what the adapter was trained with. paper: the path is shifted while "
                    "sampling, too. released code: the authors' program, which shifts in training only; samples as "
                    "the plain sampler does.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How far the adapter shifts the path. 1: as trained. 0: the plain sampler, bit for bit "
                    "(where the noise levels ascend, with inversion_refinements 0). 0.5 to 1.5 is useful.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Mode ddim only: fresh noise at every step. 0 (default): none, needed for edits of an "
                    "inverted picture. 1: as much as ddpm.",
                ),
                *inputs.percents(
                    start="When the adapter begins to act, as a share of the sampling. 0 (default): from the first "
                    "step. Use the same value for inverting and editing.",
                    end="When it stops. 1 (default): it acts to the end; 0.7 leaves the finest texture to the model.",
                    advanced=True,
                ),
                io.Float.Input(
                    "limit",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Caps what the adapter gives, as its root mean square over the latent. 0 (default): no "
                    "cap. 0.5 to 2 tames an adapter that was trained too long.",
                ),
                io.Int.Input(
                    "inversion_refinements",
                    default=2,
                    min=0,
                    max=20,
                    advanced=True,
                    tooltip="Only where the noise levels ascend: corrections of each step, so that sampling undoes the "
                    "inversion closer. Each costs one more model call a step; 2 (default) leaves a small error, 6 "
                    "nearly none, 0 is the plain inversion.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="For SamplerCustom or SamplerCustomAdvanced, with any guider, noise levels and masks. "
                    "The adapter reads the positive prompt.",
                )
            ],
        )

    @classmethod
    def execute(cls, context_adapter, **chosen) -> io.NodeOutput:
        function = ContextSampling(context_adapter, SamplerSettings.of(chosen))
        return io.NodeOutput(comfy.samplers.KSAMPLER(function))


class SaveContextAdapter(io.ComfyNode):
    """Write a context adapter to models/palimpsest_context."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return saving.save_schema(
            ADAPTERS,
            description="Saves a trained context adapter as a .safetensors file in models/palimpsest_context, for Load "
            "Context Adapter.",
            search_aliases=["contextdiff", "save adapter", "context aware adapter"],
            more_inputs=(
                io.Combo.Input(
                    "precision",
                    options=list(files.PRECISIONS),
                    tooltip="float32 (default): exact, for training on. float16: half the file, pictures differ by "
                    "rounding only.",
                ),
            ),
        )

    @classmethod
    def validate_inputs(cls, filename=None) -> bool | str:
        return saving.checked(filename, files.SHELF.try_new)

    @classmethod
    def execute(cls, context_adapter, filename=None, precision="float32") -> io.NodeOutput:
        return saving.save(cls, ADAPTERS, context_adapter, filename, precision=precision)


class LoadContextAdapter(io.ComfyNode):
    """Read a context adapter from models/palimpsest_context."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return saving.load_schema(
            ADAPTERS,
            description="Loads a context adapter that Save Context Adapter wrote, for the Context-Aware Sampler or to "
            "train it on.",
            search_aliases=["contextdiff", "load adapter", "context aware adapter"],
            more_inputs=(
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Only for an adapter that sees pictures through CLIP's image encoder: the encoder that it "
                    "was trained with.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Only for an adapter of the kind CLIP of x0_hat: the checkpoint's VAE. Sampling decodes "
                    "the picture so far at every step, which costs a VAE Decode and a CLIP Vision Encode each time.",
                ),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="Only for an adapter of the kind CLIP of source: the picture that it looks at while "
                    "sampling, or one for each picture that is sampled. Read once; sampling then costs no VAE pass.",
                ),
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_) -> str:
        """Read again when the file changed."""
        return files.SHELF.fingerprint(file)

    @classmethod
    def execute(cls, file, clip_vision=None, vae=None, source=None) -> io.NodeOutput:
        seeing = partial(files.seeing, clip_vision=clip_vision, vae=vae, source=source)
        return saving.load(cls, ADAPTERS, file, made=seeing)


SHELVES = [files.SHELF]
NODES = [TrainContextAdapter, SaveContextAdapter, LoadContextAdapter, ContextSampler, ContextCondition]
