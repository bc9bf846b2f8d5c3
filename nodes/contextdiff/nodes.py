"""Context-aware sampling (ContextDiff): the sampler, and its adapters on disk."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy_api.latest import io

from .. import host, sockets
from . import files as context_files
from . import sampling as context_sampling
from .adapter import describe
from .train_node import TrainContextAdapter

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


class ContextSampler(io.ComfyNode):
    """ContextDiff's sampling (arXiv:2402.16627, eq. 7 and 11) for the host's custom sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does to the picture."""
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
                    options=list(context_sampling.MODES),
                    tooltip="ddim (default): the same noise gives the same picture; also inverts where the noise "
                    "levels ascend. ddpm: fresh noise at every step, for 50 steps and more.",
                ),
                io.Combo.Input(
                    "formula",
                    options=[context_sampling.AS_TRAINED, *context_sampling.FORMULAS],
                    tooltip="as trained (default): what the adapter was trained with. paper: the path is shifted while "
                    "sampling, too. released code: the authors' program, which shifts in training only; samples as "
                    "the plain sampler does.",
                ),
                io.Float.Input(
                    "adapter_strength",
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
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the sampling after which the adapter begins to act. 0 (default): from the first "
                    "step. Use the same value for inverting and editing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the sampling after which the adapter stops. 1 (default): it acts to the end; "
                    "0.7 leaves the finest texture to the model.",
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
    def execute(
        cls,
        context_adapter,
        mode,
        formula,
        adapter_strength,
        eta,
        start_percent,
        end_percent,
        limit,
        inversion_refinements,
    ) -> io.NodeOutput:
        """The sampler function, in the host's wrapping."""
        function = context_sampling.ContextSampler(
            context_adapter,
            mode,
            formula,
            eta,
            adapter_strength,
            start_percent,
            end_percent,
            limit,
            inversion_refinements,
        )
        return io.NodeOutput(comfy.samplers.KSAMPLER(function))


class SaveContextAdapter(io.ComfyNode):
    """Write a context adapter to models/palimpsest_context."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does."""
        return io.Schema(
            node_id="PalimpsestSaveContextAdapter",
            display_name="Save Context Adapter",
            category="palimpsest/context",
            description="Saves a trained context adapter as a .safetensors file in models/palimpsest_context, for Load "
            "Context Adapter.",
            search_aliases=["contextdiff", "save adapter", "context aware adapter"],
            inputs=[
                sockets.ContextAdapter.Input("context_adapter", tooltip="From Train Context Adapter."),
                io.String.Input(
                    "filename",
                    default="context",
                    tooltip="Name of the file; a number is added and no file is replaced. Letters, digits, blanks, "
                    "dashes and underscores.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    tooltip="float32 (default): exact, for training on. float16: half the file, pictures differ by "
                    "rounding only.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The name to pick in Load Context Adapter.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, context_adapter, filename, precision) -> io.NodeOutput:
        """Save under the next free number."""
        path = context_files.new_path(filename)
        context_files.save(context_adapter, path, PRECISIONS[precision])
        host.show_text(host.node_id(cls), f"{path.name}, {path.stat().st_size / 1e6:.1f} MB")
        return io.NodeOutput(path.name, ui={"text": [path.name]})


class LoadContextAdapter(io.ComfyNode):
    """Read a context adapter from models/palimpsest_context."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does."""
        return io.Schema(
            node_id="PalimpsestLoadContextAdapter",
            display_name="Load Context Adapter",
            category="palimpsest/context",
            description="Loads a context adapter that Save Context Adapter wrote, for the Context-Aware Sampler or to "
            "train it on.",
            search_aliases=["contextdiff", "load adapter", "context aware adapter"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=context_files.listed(),
                    tooltip="A file in models/palimpsest_context. Refresh (R) lists new ones.",
                )
            ],
            outputs=[
                sockets.ContextAdapter.Output(
                    display_name="context_adapter", tooltip="For the Context-Aware Sampler or Train Context Adapter."
                ),
                io.String.Output(
                    display_name="report", tooltip="What the adapter fits, its size, and how it was trained."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        """Read again when the file changed."""
        return context_files.SHELF.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        """Load and check."""
        adapter = context_files.load(context_files.SHELF.path(file))
        report = describe(adapter)
        host.show_text(host.node_id(cls), report)
        return io.NodeOutput(adapter, report)


SHELVES = [context_files.SHELF]
NODES = [TrainContextAdapter, SaveContextAdapter, LoadContextAdapter, ContextSampler]
