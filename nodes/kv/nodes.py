"""KV Inversion: learn a picture into the self-attention's keys and values, then redraw it by another prompt."""

from __future__ import annotations

import time
from dataclasses import replace

import latent_preview
from comfy_api.latest import io

from .. import host, sockets
from ..inversion import measure
from . import auto as kv_auto
from . import files as kv_files
from . import sampling as kv_sampling
from . import tuning as kv_tuning
from .embeddings import KVEmbeddings

GUIDED, CONDITIONAL = "with guidance", "prompt only"
AS_SET, PAPER = "as set below", "paper"
EVERYTHING, WEIGHTS = "embeddings and weights", "weights only"
# arXiv:2309.16608, section 4: guidance 7.5, decoder, one conditional eps in eq. 4; its optimiser is not printed,
# null-text inversion's takes its place. The edit uses the source after the first tenths of the steps (figure 6).
PAPER_TUNING = {
    "guidance": 7.5, "tune_cfg": CONDITIONAL, "placement": "decoder", "start": 0.0, "inner_steps": 10,
    "learning_rate": 0.01, "tolerance": 1e-5, "warm_start": False, "end": 1.0, "learn": EVERYTHING, "rank": 0,
    "keyframes": 1, "batch_steps": 1, "auto": False,
}  # fmt: skip
PAPER_EDITING = {
    "mode": "recompute",
    "strength": 1.0,
    "source_guidance": 1.0,
    "start_percent": 0.4,
    "end_percent": 1.0,
    "layers": "all",
    "look_ahead": 0.0,
}
PRESET_TOOLTIP = (
    "as set below: the values under this line act. paper: the paper's own values replace them (see the help page)."
)


class TuneKV(io.ComfyNode):
    """Stage 2 of KV Inversion: fit K_hat, V_hat, lambda and gamma so that sampling rebuilds the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does to the picture."""
        return io.Schema(
            node_id="PalimpsestTuneKV",
            display_name="Tune KV",
            category="palimpsest/inversion",
            description="Learns keys and values in the model's self-attention that rebuild your picture at the "
            "guidance you edit "
            "with. Tune once, save, edit many times. The model itself is not trained.",
            search_aliases=["kv inversion", "action editing", "pose edit", "null text inversion", "real image editing"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with."),
                sockets.Trajectory.Input("trajectory", tooltip="From Invert Picture."),
                io.Conditioning.Input(
                    "positive", tooltip="The same prompt as in Invert Picture: the picture as it is."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt you will edit with."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Only for the report: measures the reconstruction in pixels, too."
                ),
                io.Combo.Input("preset", options=[AS_SET, PAPER], tooltip=PRESET_TOOLTIP),
                io.Float.Input(
                    "guidance",
                    default=3.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The guidance you will edit with: the picture is learned so that it comes back at this "
                    "value. "
                    "3 for the pocket model, 4 to 7.5 for SD 1.5 and SDXL; lower keeps more of the picture.",
                ),
                io.Combo.Input(
                    "tune_cfg",
                    options=[GUIDED, CONDITIONAL],
                    tooltip="with guidance (default): rebuilds the picture at the guidance above. prompt only: the "
                    "paper's "
                    "equation 4 to the letter, half the cost, rebuilds it at guidance 1 only.",
                ),
                io.Combo.Input(
                    "placement",
                    options=list(kv_tuning.PLACEMENTS),
                    default="decoder",
                    tooltip="Which self-attention layers learn. decoder: the paper's best. all: nearer to the "
                    "source, poses get "
                    "stiff. encoder, middle: lose content.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="Share of the steps that pass before learning begins. 0 rebuilds best; later starts "
                    "leave more freedom "
                    "to the new pose and remember less.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=10,
                    min=0,
                    max=1000,
                    tooltip="Learning iterations at every step, at most. 5 to 30. Each costs about 3 model calls: 10 "
                    "over 20 steps "
                    "take about as long as 30 ordinary samplings of 20 steps.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.1,
                    min=0.0001,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of a learning step. 0.05 to 0.2 for few iterations; lower is slower and smoother.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.00001,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    round=False,
                    advanced=True,
                    tooltip="Stops a step's learning early once its mean squared error is below this (plus twice "
                    "this for every "
                    "step taken). 0 never stops early.",
                ),
                io.Boolean.Input(
                    "warm_start",
                    default=True,
                    advanced=True,
                    tooltip="Each step starts from what the step before learned. Fewer iterations for the same error.",
                ),
                io.Boolean.Input(
                    "keep_source",
                    default=True,
                    advanced=True,
                    tooltip="Also keep the source's own keys and values, which Apply KV's modes extend and frozen "
                    "need. Half as large a file again.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the steps after which learning stops. 1: to the last step. Below 1 the finest "
                    "texture is left to the model.",
                ),
                io.Combo.Input(
                    "learn",
                    options=[EVERYTHING, WEIGHTS],
                    optional=True,
                    advanced=True,
                    tooltip="embeddings and weights (default): keys and values of the picture are learned. weights "
                    "only: the source's own keys and values are used as they are and only four weights a layer are "
                    "learned; a third of the file, rebuilds less exactly.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Keeps keys and values as thin factors of this rank, and the source at four times it: "
                    "smaller files, fine texture may soften. 0: in full. 32 for SD 1.5 and SDXL (a fifth and a ninth "
                    "of the size), 4 to 8 for the pocket model (a tenth and a fifth).",
                ),
                io.Int.Input(
                    "keyframes",
                    default=1,
                    min=1,
                    max=10,
                    optional=True,
                    advanced=True,
                    tooltip="Learns every n-th step and interpolates between: n times smaller, rebuilds a little less "
                    "exactly. 1: every step. 2 to 4 are useful.",
                ),
                io.Int.Input(
                    "batch_steps",
                    default=1,
                    min=1,
                    max=50,
                    optional=True,
                    advanced=True,
                    tooltip="Learns this many steps at once, each from the picture's recorded path, then mends them "
                    "one after another. Faster where the GPU is not filled by one picture; takes as many times more "
                    "memory. 1: the paper's way.",
                ),
                io.Boolean.Input(
                    "auto",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Tries placements and starts on a few coarse steps first and takes the one that interferes "
                    "least among those that rebuild well; placement and start above are then ignored. Takes "
                    "two to three times as long. The report says what was chosen.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Learn only this part of the picture (white), for instance the subject. To keep the old "
                    "background out of an edit as well, give Apply KV a source_mask.",
                ),
            ],
            outputs=[
                sockets.KV.Output(display_name="kv", tooltip="The learned keys and values, for Apply KV and Save KV."),
                io.Latent.Output(display_name="reconstruction", tooltip="The picture as the tuned model rebuilds it."),
                io.String.Output(display_name="report", tooltip="Measured error, iterations, size and time."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        positive,
        preset,
        guidance,
        tune_cfg,
        placement,
        start,
        inner_steps,
        learning_rate,
        tolerance,
        warm_start,
        keep_source,
        end=1.0,
        learn=EVERYTHING,
        rank=0,
        keyframes=1,
        batch_steps=1,
        auto=False,
        negative=None,
        vae=None,
        mask=None,
    ) -> io.NodeOutput:
        """Fit, then report how near the reconstruction came."""
        chosen = {
            "guidance": guidance, "tune_cfg": tune_cfg, "placement": placement, "start": start,
            "inner_steps": inner_steps, "learning_rate": learning_rate, "tolerance": tolerance,
            "warm_start": warm_start, "end": end, "learn": learn, "rank": rank, "keyframes": keyframes,
            "batch_steps": batch_steps, "auto": auto,
        }  # fmt: skip
        chosen |= PAPER_TUNING if preset == PAPER else {}
        guided, guidance = chosen.pop("tune_cfg") == GUIDED, chosen.pop("guidance")
        guidance = guidance if guided else 1.0
        if guidance != 1.0 and negative is None:
            raise ValueError(
                f"guidance is {guidance:g}: guidance other than 1 needs the negative prompt; connect one (empty text)."
            )
        placement, weights_only, auto = chosen.pop("placement"), chosen.pop("learn") == WEIGHTS, chosen.pop("auto")
        settings = kv_tuning.TuneSettings(**chosen, weights_only=weights_only, keep_source=keep_source)
        began = time.monotonic()
        shown = host.ProgressText(host.node_id(cls))
        choice = ""
        if auto:
            best, tried = kv_auto.choose(
                model, trajectory, positive, negative, guidance, settings,
                lambda done, of: shown.update(f"trying placements and starts, {done} of {of}"), mask,
            )  # fmt: skip
            placement, settings = best.placement, replace(settings, start=best.start)
            choice = "; ".join(["auto took " + str(best), *(str(c) for c in tried if c is not best)])

        def report_iteration(step: int, iteration: int, loss: float) -> None:
            shown.update(
                f"step {step + 1} of {trajectory.steps}, iteration {iteration} of {settings.inner_steps}, loss "
                f"{loss:.2e}"
            )

        kv, rebuilt = kv_tuning.tune(
            model,
            trajectory,
            positive,
            negative,
            guidance,
            placement,
            settings,
            report_iteration,
            latent_preview.prepare_callback(model, trajectory.steps),
            mask,
        )
        wanted = model.model.process_latent_out(trajectory.latents[-1].clone())
        numbers = measure.reconstruction(rebuilt, wanted, vae)
        kv.info.update(numbers, guidance=guidance, placement=placement, **vars(settings))
        report = (
            f"rebuilt at guidance {guidance:g}: {measure.sentence(numbers)}; {kv.info['iterations']} iterations, "
            f"{kv.bytes / 1e6:.1f} MB, {time.monotonic() - began:.0f} s"
        )
        if trajectory.prompt != host.conditioning_fingerprint(positive):
            report += "; note: the prompt differs from the one the picture was inverted with"
        report += f"; {choice}" if choice else ""
        shown.update(report, now=True)
        return io.NodeOutput(kv, {"samples": rebuilt}, report)


class ApplyKV(io.ComfyNode):
    """Stage 3 of KV Inversion: sample with the tuned keys and values in self-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does to the picture."""
        return io.Schema(
            node_id="PalimpsestApplyKV",
            display_name="Apply KV",
            category="palimpsest/inversion",
            description="Gives the model the learned keys and values of your picture. Sample from the inverted noise "
            "with a new "
            "prompt: the pose follows the prompt, texture and identity stay.",
            search_aliases=["kv inversion", "masactrl", "action editing", "keep identity", "consistent edit"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples the edit. Patches of other nodes stay active."),
                sockets.KV.Input("kv", tooltip="From Tune KV or Load KV."),
                io.Combo.Input("preset", options=[AS_SET, PAPER], tooltip=PRESET_TOOLTIP),
                io.Combo.Input(
                    "mode",
                    options=list(kv_sampling.MODES),
                    tooltip="extend (default): the edit looks at itself and at the source. recompute: the paper's "
                    "Algorithm 1, "
                    "the edit's own keys and values with the learned ones blended in. frozen: only at the source.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the source is used. 1: as learned. 0: the plain model, bit for bit. 0.5 to "
                    "0.8 frees the pose.",
                ),
                io.Float.Input(
                    "source_guidance",
                    default=10.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How hard to insist on the source's look, as guidance does for the prompt. 1: off. 8 to 12 "
                    "suit small models such as the pocket model; begin at 2 to 4 with SD 1.5 and SDXL. More brings "
                    "coat, "
                    "collar and colours back, too much burns them in. Half as much time again a step.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the source begins to act, as a share of the sampling. 0 to 0.4: later lets the "
                    "prompt lay out a new "
                    "pose first.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the source stops acting. 1 keeps the finest texture; earlier lets the model finish "
                    "on its own.",
                ),
                io.Combo.Input(
                    "layers",
                    options=["all", "decoder", "encoder", "middle"],
                    advanced=True,
                    tooltip="Which of the tuned layers act. all: every layer that was tuned.",
                ),
                io.Float.Input(
                    "look_ahead",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Modes frozen and extend: show the edit the source as it was later in its own sampling, "
                    "where "
                    "coat and texture are clearer. 0: at the same step. 0.1 to 0.3: more texture. 1: the finished "
                    "source.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the source may act in the edited picture: white follows the source, black is left "
                    "to the model. For two subjects, one Apply KV after the other, each with its mask.",
                ),
                io.Mask.Input(
                    "source_mask",
                    optional=True,
                    tooltip="Which part of the source picture may be looked at: white only, for instance the subject, "
                    "so that nothing of the old background comes along.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the source's keys and values.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        kv,
        preset,
        mode,
        strength,
        source_guidance,
        start_percent,
        end_percent,
        layers,
        look_ahead,
        mask=None,
        source_mask=None,
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        if preset == PAPER:
            mode, strength, source_guidance, start_percent, end_percent, layers, look_ahead = PAPER_EDITING.values()
        if end_percent < start_percent:
            raise ValueError(f"end_percent {end_percent:g} lies before start_percent {start_percent:g}: swap them.")
        for name, given, pictures in (("mask", mask, None), ("source_mask", source_mask, kv.pictures)):
            if given is not None:
                count = given.reshape(-1, *given.shape[-2:]).shape[0]
                rows = host.picture_rows(given, count if pictures is None or count == 1 else pictures, 1, 1, name)
                if given is source_mask and not bool((rows > 0).all()):
                    raise ValueError("source_mask is black: nothing of the source could be looked at. Paint it white.")
        return io.NodeOutput(
            kv_sampling.apply(
                model,
                kv,
                mode,
                strength,
                start_percent,
                end_percent,
                layers,
                mask,
                look_ahead,
                source_guidance,
                source_mask,
            )
        )


class SaveKV(io.ComfyNode):
    """Write KV embeddings to models/palimpsest_kv."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does."""
        return io.Schema(
            node_id="PalimpsestSaveKV",
            display_name="Save KV",
            category="palimpsest/inversion",
            description="Saves tuned keys and values as a .safetensors file in models/palimpsest_kv, for Load KV.",
            search_aliases=["kv inversion", "save embeddings"],
            inputs=[
                sockets.KV.Input("kv", tooltip="From Tune KV."),
                io.String.Input(
                    "filename",
                    default="picture",
                    tooltip="Name of the file; a number is added. Letters, digits, blanks, dashes and underscores.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The name to pick in Load KV.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, kv, filename) -> io.NodeOutput:
        """Save under the next free number."""
        path = kv_files.new_path(filename)
        kv_files.save(kv, path)
        host.show_text(host.node_id(cls), f"{path.name}, {kv.bytes / 1e6:.1f} MB")
        return io.NodeOutput(path.name, ui={"text": [path.name]})


class LoadKV(io.ComfyNode):
    """Read KV embeddings from models/palimpsest_kv."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does."""
        return io.Schema(
            node_id="PalimpsestLoadKV",
            display_name="Load KV",
            category="palimpsest/inversion",
            description="Loads keys and values that Save KV wrote, so that a tuned picture can be edited again "
            "without tuning.",
            search_aliases=["kv inversion", "load embeddings"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=kv_files.listed(),
                    tooltip="A file in models/palimpsest_kv. Refresh (R) lists new ones.",
                )
            ],
            outputs=[
                sockets.KV.Output(display_name="kv", tooltip="For Apply KV."),
                io.String.Output(display_name="report", tooltip="What the file holds."),
                io.Latent.Output(
                    display_name="noise",
                    tooltip="The picture's inverted noise, to sample edits from without inverting again.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        """Read again when the file changed."""
        return kv_files.SHELF.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        """Load and check."""
        kv = kv_files.load(kv_files.SHELF.path(file))
        report = describe(kv)
        host.show_text(host.node_id(cls), report)
        return io.NodeOutput(kv, report, {"samples": kv.noise.clone()})


class PromptLines(io.ComfyNode):
    """One prompt per line, as a list: everything behind it runs once for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does."""
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
    def execute(cls, lines, template) -> io.NodeOutput:
        """Fill the template with every line."""
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}}: write it where each line should go, or {{}} alone.")
        kept = [line.strip() for line in lines.splitlines()]
        prompts = [template.replace("{}", line) for line in kept if line and not line.startswith("#")]
        if not prompts:
            raise ValueError("lines holds no prompt: write one per line.")
        return io.NodeOutput(prompts)


def describe(kv: KVEmbeddings) -> str:
    """One line on what embeddings hold."""
    _, height, width = kv.latent
    error = f", {measure.sentence(kv.info)}" if "latent_rmse" in kv.info else ""
    rank = f"rank {kv.rank}, " if kv.rank else ""
    return (
        f"{kv.pictures} picture(s) of {width * 8} x {height * 8}, {len(kv.sigmas) - 1} steps, {len(kv.layers)} layers, "
        f"{rank}{kv.bytes / 1e6:.1f} MB{error}"
    )


SHELVES = [kv_files.SHELF]
NODES = [TuneKV, ApplyKV, SaveKV, LoadKV, PromptLines]
