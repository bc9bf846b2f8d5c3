"""Training a context adapter (ContextDiff) on pictures or a clip."""

from __future__ import annotations

import time

import latent_preview
from comfy_api.latest import io

from .. import host, inputs, saving, sockets
from ..settings import AS_SET_ABOVE
from ..training import FileSet, Watch, nothing
from . import files, plot
from .config import KINDS, SIZES
from .fit import ALL_ATTENTION, FROZEN, JOINT, QUERIES, Trained, TrainSettings
from .objective import FORWARD, SEEN
from .training import describe, train

RESCUED = "context_rescued"


class TrainContextAdapter(io.ComfyNode):
    """ContextDiff's training (arXiv:2402.16627, eq. 6) of the adapter r_phi."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTrainContextAdapter",
            display_name="Train Context Adapter",
            category="palimpsest/context",
            description="Trains the small network that the Context-Aware Sampler samples with, on a picture, a batch "
            "or a clip and the prompts that describe them. The model itself stays as it is. Tells in words whether "
            "sampling gained what the training loss did.",
            search_aliases=["contextdiff", "context aware adapter", "one-shot tuning", "tune a video", "train adapter"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD 1.x, SD 2.x, SDXL or SD 3 model, with LoRAs if you will sample with them. The "
                    "gradient passes through it: in half precision a picture of a step takes 0.8 GB beside the weights "
                    "for SD 1.5 at 512 px, 5.3 GB for SDXL at 1024 px.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The picture, pictures of one size, or frames of a clip in their order, from VAE Encode. "
                    "One picture is enough to learn that picture; an adapter for a whole kind of pictures needs "
                    "dozens.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt that describes the picture as it is: one for all, or one for each picture in "
                    "their order, joined with Conditioning (Combine).",
                ),
                sockets.ContextAdapter.Input(
                    "context_adapter",
                    optional=True,
                    tooltip="An adapter to train on, which itself stays as it is; size below is then ignored. Leave "
                    "it unconnected to begin a new one.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    tooltip="Size of a new adapter. small (default, 2 million numbers) suits a picture or a clip; "
                    "medium (6) and large (14) need many pictures. The U-Net sets the time, so that size costs little.",
                ),
                io.Boolean.Input(
                    "video",
                    default=False,
                    tooltip="On: the batch is one clip, and a frame's shift may depend on the frames before. Off "
                    "(default): pictures by themselves.",
                ),
                io.Combo.Input(
                    "formula",
                    options=list(FORWARD),
                    tooltip="paper (default): the path is shifted while training and while sampling. released code: "
                    "the authors' program, which shifts the noise in training only; useful with train_unet, for a "
                    "frozen U-Net samples as before.",
                ),
                io.Combo.Input(
                    "train_on",
                    options=list(SEEN),
                    tooltip="x0_hat (default): the adapter sees the model's own guess of the picture, as it will while "
                    "sampling; a third more time. x0: it sees the true picture, as in the paper; the loss falls "
                    "deeper, and part of that may be a leak that sampling cannot use.",
                ),
                io.Int.Input(
                    "steps",
                    default=200,
                    min=1,
                    max=100000,
                    tooltip="Training steps. 200 for a picture or a clip; 500 to 2000 for a set of pictures. A step "
                    "costs about as much as 3 model calls of its batch, 4 with train_on x0_hat.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0001,
                    min=0.0000001,
                    max=0.1,
                    step=0.00001,
                    round=False,
                    tooltip="Size of the first steps; it falls to a hundredth until the end. 0.0001 (default) is usual "
                    "for a small network beside a large one; up to 0.002 in few steps. Lower needs more steps, too "
                    "high burns spots into the pictures.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Pictures in one step, or frames in a row of a clip. Fewer pictures than that come several "
                    "times, each with other noise. 4 to 8 learn steadier; time and memory grow with it.",
                ),
                io.Combo.Input(
                    "train_unet",
                    options=[FROZEN, JOINT],
                    tooltip="frozen (default): only the adapter learns. LoRA on to_q: the paper's joint training, a "
                    "LoRA on the queries of all attention beside it; it leaves by the output lora and must be loaded "
                    "when you sample with this adapter.",
                ),
                inputs.seed(
                    "Sets the new adapter's weights, the noise and the order of the pictures. The same seed gives the "
                    "same adapter.",
                    control_after_generate=True,
                ),
                io.Int.Input(
                    "validate_every",
                    default=50,
                    min=0,
                    max=100000,
                    tooltip="Measures the adapter by sampling after so many steps; the picture shows under the node "
                    "and the numbers in the plot. Costs 22 model calls of a batch each time. 0: only at the end.",
                ),
                io.Int.Input(
                    "lora_rank",
                    default=8,
                    min=1,
                    max=128,
                    advanced=True,
                    tooltip="Only with train_unet LoRA on to_q: the LoRA's rank. 4 to 16; more can change the model "
                    "further.",
                ),
                io.Float.Input(
                    "min_snr_gamma",
                    default=5.0,
                    min=0.01,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Caps the weight of low noise levels in the loss. 5 (default) balances layout and texture; "
                    "1 puts the weight on the layout, 100 on fine texture.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    advanced=True,
                    tooltip="On: blocks of the network run again for the gradient instead of being kept, 0.2 GB in "
                    "place of 0.8 for SD 1.5, 0.6 in place of 5.3 for SDXL, for a quarter to a third more time. "
                    "The result is the same. Off (default): faster.",
                ),
                io.String.Input(
                    "rescue_filename",
                    default=RESCUED,
                    advanced=True,
                    tooltip="If the training is cancelled or fails, what it learned so far is saved under this name in "
                    "models/palimpsest_context, for Load Context Adapter, and its LoRA in models/loras; tried before "
                    "the first step. Empty: lost.",
                ),
                io.Combo.Input(
                    "adapter",
                    options=list(KINDS),
                    optional=True,
                    tooltip="What a new adapter sees. latent (default): the picture's latent, at no cost. CLIP of "
                    "x0_hat: as the paper prints it, the model's guess of the picture through CLIP's image encoder; a "
                    "VAE decode and a CLIP pass for every picture of every step, while sampling, too. CLIP of source: "
                    "the training pictures through CLIP, read once. released code: a layer-normed shift made from the "
                    "prompt alone, as the authors' program comes to; for formula released code.",
                ),
                io.Combo.Input(
                    "trained_with",
                    options=[QUERIES, ALL_ATTENTION],
                    optional=True,
                    advanced=True,
                    tooltip="Only with train_unet LoRA on to_q: which layers get the LoRA. queries (default): as the "
                    "authors' program. all attention: keys, values and outputs too, four times as many numbers, which "
                    "can change the picture's content further.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AS_SET_ABOVE, *TrainSettings.PRESETS],
                    optional=True,
                    advanced=True,
                    tooltip="as set above (default): every value as you set it. paper: what the paper prints: a large "
                    "adapter that sees CLIP of x0_hat (connect clip_vision and vae), trained on x0 with a LoRA on all "
                    "attention; steps, rate and the rest as set. Slower.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Only for the two CLIP kinds of adapter: from Load CLIP Vision. The paper's is ViT-B/32; "
                    "any CLIP, SigLIP or DINO encoder will do, the same one for training and sampling.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Only for the two CLIP kinds of adapter: the VAE that the latent was encoded with. It "
                    "decodes without a gradient what CLIP then sees.",
                ),
            ],
            outputs=[
                sockets.ContextAdapter.Output(
                    display_name="context_adapter",
                    tooltip="For the Context-Aware Sampler and Save Context Adapter.",
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="The training loss, the loss by noise level, and the errors of each validation against "
                    "the model without an adapter.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Loss, what sampling gained, and in words whether the adapter learned something that "
                    "sampling can use.",
                ),
                io.Custom("LORA_MODEL").Output(
                    display_name="lora",
                    tooltip="With train_unet LoRA on to_q: for the host's Load LoRA Model and Save LoRA Weights. "
                    "Empty, and without effect, for a frozen U-Net.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, rescue_filename=None) -> bool | str:
        """Say before anything runs what could not be saved. An input that is named here the host checks no more."""
        name = rescue_filename if (rescue_filename or "").strip() else None
        return saving.checked(name, files.SHELF.try_new)

    @classmethod
    def execute(
        cls,
        model,
        latent,
        positive,
        rescue_filename=RESCUED,
        context_adapter=None,
        clip_vision=None,
        vae=None,
        **chosen,
    ) -> io.NodeOutput:
        settings, began = TrainSettings.of(chosen), time.monotonic()
        shown, kept = host.ProgressText(host.node_id(cls)), None
        if rescue_filename.strip():
            kept = files.rescue_files(rescue_filename, settings.train_unet == JOINT)
        watch = watch_over(model, settings, shown, kept)
        trained = train(
            model, latent["samples"], positive, settings, context_adapter, watch, clip_vision=clip_vision, vae=vae
        )
        report = f"{describe(trained, settings)}; {time.monotonic() - began:.0f} s{host.guidance_left_out(model)}"
        return io.NodeOutput(
            trained.adapter, plot.draw(trained.history), report, trained.lora, ui=host.told(cls, report)
        )


def watch_over(model, settings: TrainSettings, shown: host.ProgressText, kept: FileSet | None) -> Watch:
    """Show previews and text under the node; save what was learned where the training ends early."""
    preview = latent_preview.prepare_callback(model, settings.steps)

    def show(step, denoised) -> None:
        preview(step, denoised, denoised, settings.steps)

    def rescue(trained: Trained) -> None:
        if kept is not None:
            lora = {"lora": (trained.lora, {})} if trained.lora else {}
            written = kept.write({"adapter": files.content(trained.adapter)} | lora)
            shown.update(f"{trained.history.kept} steps saved as {', '.join(written)}", now=True)

    return Watch(show, shown.update, rescue, kept.require_room if kept else nothing)
