"""Tune KV: a picture is learned into the keys and values of self-attention."""

from __future__ import annotations

import time
from dataclasses import replace

import latent_preview
from comfy_api.latest import io

from .. import host, inputs, inversion, sockets
from ..settings import AS_SET
from . import auto
from .embeddings import KVEmbeddings
from .recorded import RecordedKV, record_joint
from .recording import record
from .settings import CONDITIONAL, EVERYTHING, GUIDED, LAYERS, PRESET_TOOLTIP, WEIGHTS, TuneSettings
from .tuning import tune


class TuneKV(io.ComfyNode):
    """Stage 2 of KV Inversion: fit K_hat, V_hat, lambda and gamma so that sampling rebuilds the picture."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTuneKV",
            display_name="Tune KV",
            category="palimpsest/inversion",
            description="Learns keys and values in the model's self-attention that rebuild your picture at the "
            "guidance you edit with. Tune once, save, edit many times. The model itself is not trained.",
            search_aliases=[
                "kv inversion",
                "action editing",
                "pose edit",
                "null text inversion",
                "real image editing",
                "pose",
                "identity",
                "character",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with."),
                inputs.trajectory("From Invert Picture."),
                io.Conditioning.Input(
                    "positive", tooltip="The same prompt as in Invert Picture: the picture as it is."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt you will edit with."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Only for the report: measures the reconstruction in pixels, too."
                ),
                io.Combo.Input("preset", options=[AS_SET, *TuneSettings.PRESETS], tooltip=PRESET_TOOLTIP),
                inputs.guidance(
                    tooltip="The guidance you will edit with: the picture is learned so that it comes back at this "
                    "value. 7.5 (default) is the paper's; 4 to 7.5, lower keeps more of the picture.",
                ),
                io.Combo.Input(
                    "tune_with",
                    options=[GUIDED, CONDITIONAL],
                    tooltip="with guidance (default): rebuilds the picture at the guidance above. prompt only: the "
                    "paper's equation 4 to the letter, half the cost, rebuilds it at guidance 1 only.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="decoder",
                    tooltip="Which self-attention layers learn. decoder: the paper's best. all: nearer to the source, "
                    "poses get stiff. encoder, middle: lose content. In transformers thirds of the blocks, decoder the "
                    "last.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="Share of the steps that pass before learning begins. 0 rebuilds best; later starts leave "
                    "more freedom to the new pose and remember less.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=10,
                    min=0,
                    max=1000,
                    tooltip="Learning iterations at every step, at most. 5 to 30. Each costs about 3 model calls: 10 "
                    "over 20 steps take about as long as 17 guided samplings of 20 steps. 0 learns nothing and "
                    "records what Apply KV's mode extend shows, in one model call a step: all that a large "
                    "transformer (FLUX, Qwen-Image) may leave memory for.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=0.0001,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of a learning step. 0.01 (default) is null-text inversion's; up to 0.1 where few "
                    "iterations do not rebuild the picture. Lower is slower and smoother.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.00001,
                    min=0.0,
                    max=1.0,
                    step=0.000001,
                    round=False,
                    advanced=True,
                    tooltip="Stops a step's learning early once its mean squared error is below this (plus twice this "
                    "for every step taken). 0 never stops early.",
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
                    "end_percent",
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
                    "smaller files, fine texture may soften. 0: in full. 32: a fifth of the size for SD 1.5, a "
                    "ninth for SDXL; for transformers always set it (16 to 32).",
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
                    "auto_layers",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Tries layers and starts on a few coarse steps first and takes what interferes least among "
                    "those that rebuild well; layers and start_percent above are then ignored. Takes two to three "
                    "times as long. The report says what was chosen.",
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
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, trajectory, positive, negative=None, vae=None, mask=None, **chosen) -> io.NodeOutput:
        """Fit, then report how near the reconstruction came."""
        settings, began = TuneSettings.of(chosen), time.monotonic()
        if settings.record_only:
            return cls.recorded(model, trajectory, positive, settings)
        inputs.require_negative(settings.run_guidance, negative)
        shown, choice = host.ProgressText(host.node_id(cls)), ""
        if settings.auto_layers:
            settings, choice = with_best_layers(model, trajectory, positive, negative, settings, shown=shown, mask=mask)

        def tell(step: int, iteration: int, loss: float) -> None:
            iterations = f"iteration {iteration} of {settings.inner_steps}"
            shown.update(f"step {step + 1} of {trajectory.steps}, {iterations}, loss {loss:.2e}")

        preview = latent_preview.prepare_callback(model, trajectory.steps)
        kv, rebuilt = tune(model, trajectory, positive, negative, settings, report=tell, callback=preview, mask=mask)
        wanted = model.model.process_latent_out(host.as_sampled(model, trajectory.latents[-1].clone()))
        numbers = inversion.reconstruction_error(rebuilt, wanted, vae)
        kv.info.update(settings.named() | numbers | {"guidance": settings.run_guidance})
        report = (
            f"rebuilt at guidance {settings.run_guidance:g}: {inversion.error_in_words(numbers)}; "
            f"{kv.info['iterations']} iterations, {kv.bytes / 1e6:.1f} MB, {time.monotonic() - began:.0f} s"
        ) + inputs.prompt_note(trajectory, positive)
        if host.family_of(model) is not None:
            kv = beside_record(model, trajectory, positive, settings, kv)
            report += f"; {kv.said}" if kv.said else ""
        if settings.run_guidance != 1.0 and host.reads_guidance(model):
            report += (
                "; this model reads its guidance as an input and is sampled at cfg 1: tune at guidance 1, or record"
            )
        report += f"; {choice}" if choice else ""
        return io.NodeOutput(kv, {"samples": rebuilt}, report, ui=host.told(cls, report))

    @classmethod
    def recorded_jointly(cls, model, trajectory, positive, settings: TuneSettings) -> io.NodeOutput:
        """Record the source on a transformer."""
        preview = latent_preview.prepare_callback(model, len(settings.recorded(trajectory.steps)))
        kv = record_joint(model, trajectory, positive, settings, preview)
        clean = host.as_sampled(model, trajectory.latents[-1].clone())
        report = (
            f"{kv.family}: keys and values of the picture's tokens in {len(kv.layers)} layers, nothing learned, for "
            f"modes extend and frozen; {kv.said}"
        ) + inputs.prompt_note(trajectory, positive)
        return io.NodeOutput(kv, {"samples": model.model.process_latent_out(clean)}, report, ui=host.told(cls, report))

    @classmethod
    def recorded(cls, model, trajectory, positive, settings: TuneSettings) -> io.NodeOutput:
        """Record the source, learn nothing. Raises ValueError for auto_layers, which tries what is learned."""
        if host.family_of(model) is not None:
            return cls.recorded_jointly(model, trajectory, positive, settings)
        if settings.auto_layers:
            raise ValueError("auto_layers compares what is learned: set inner_steps above 0, or auto_layers off.")
        began, shown = time.monotonic(), host.ProgressText(host.node_id(cls))
        kv = record(
            model,
            trajectory,
            positive,
            settings,
            report=lambda done, of: shown.update(f"step {done} of {of}, recording"),
            callback=latent_preview.prepare_callback(model, len(settings.recorded(trajectory.steps))),
        )
        kv.info.update(settings.named())
        source = model.model.process_latent_out(trajectory.latents[-1].clone())
        report = (
            f"source recorded, nothing learned, for mode extend; {kv.bytes / 1e6:.1f} MB, "
            f"{time.monotonic() - began:.0f} s"
        ) + inputs.prompt_note(trajectory, positive)
        return io.NodeOutput(kv, {"samples": source}, report, ui=host.told(cls, report))


def beside_record(model, trajectory, positive, settings: TuneSettings, learned: KVEmbeddings) -> RecordedKV:
    """What was learned on a transformer with the source's record, which is made now or by Apply KV."""
    preview = latent_preview.prepare_callback(model, len(settings.recorded(trajectory.steps)))
    return replace(record_joint(model, trajectory, positive, settings, preview), learned=learned)


def with_best_layers(
    model, trajectory, positive, negative, settings: TuneSettings, *, shown: host.ProgressText, mask=None
) -> tuple[TuneSettings, str]:
    """(settings with the layers and the start that do best in a quick try, a sentence on all that were tried)."""
    best, tried = auto.choose(
        model,
        trajectory,
        positive,
        negative,
        settings,
        report=lambda done, of: shown.update(f"trying layers and starts, {done} of {of}"),
        mask=mask,
    )
    sentence = "; ".join([f"auto took {best}", *(str(other) for other in tried if other is not best)])
    return replace(settings, layers=best.layers, start_percent=best.start_percent), sentence
