"""Training the connector between a vision-language model and a U-Net."""

from __future__ import annotations

import time
from functools import partial

from comfy_api.latest import io

from ... import host, inputs, saving, sockets
from ...training import Watch, previews
from ..dataset import files as dataset_files
from ..dataset import read_dataset
from . import files, plot
from .schema import NAME, advanced, choices, later, lessons, sources
from .settings import TrainSettings
from .training import describe, train


class TrainMultimodal(io.ComfyNode):
    """MUMU's training (arXiv:2406.18790, section 5) on the host's own U-Net."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTrainMultimodal",
            display_name="Train Multimodal Encoder",
            category="palimpsest/multimodal",
            description="Trains the connector through which a U-Net reads prompts of words and pictures, on a dataset "
            "of Build Multimodal Dataset, and LoRAs beside it if you like. Saves everything as files by itself, while "
            "it trains and when it is cancelled.",
            search_aliases=["mumu", "train connector", "train adapter", "multimodal prompt", "interleaved training"],
            is_output_node=True,
            inputs=[*sources(), *choices(), *advanced(), *lessons(), *later()],
            outputs=[
                sockets.MultimodalEncoder.Output(
                    display_name="multimodal_encoder",
                    tooltip="The encoder with the trained connector, for Multimodal Prompt; the same as loading its "
                    "files.",
                ),
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, with the trained LoRA where one was trained.",
                ),
                io.Image.Output(
                    display_name="samples",
                    tooltip="Up to four prompts of the dataset: their crops, what the model draws for them, and the "
                    "picture they were cut from.",
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="The loss, and the loss where there is little, middling and much noise.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Loss, sizes, and the files that were written.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name=None, keep_state=None) -> bool | str:
        """Say before anything runs what could not be saved; LoRAs are tried before the first step."""
        return saving.checked(name, lambda name: files.TrainingFiles.new(name, keep_state is not False))

    @classmethod
    def execute(
        cls,
        model,
        vae,
        multimodal_encoder,
        folder=dataset_files.CONNECTED,
        resume=files.NEW,
        name=NAME,
        keep_state=True,
        dataset=None,
        clip=None,
        **chosen,
    ) -> io.NodeOutput:
        import comfy.sd

        settings, began, written = TrainSettings.of(chosen), time.monotonic(), []
        if dataset is None:
            dataset = read_dataset(dataset_files.dataset_path(folder))
        state = None if resume == files.NEW else files.load_state(files.STATES.path(resume))
        learns = {"unet": settings.train_unet, "language": settings.train_language}
        begun = 0 if state is None else int(state["steps"])
        steps = settings.course.end(begun, settings.steps) - begun
        kept, shown = files.TrainingFiles.new(name, keep_state, **learns), host.ProgressText(host.node_id(cls))

        def save(snapshot) -> None:
            written[:] = kept.save(snapshot)
            shown.update(f"{snapshot.info['steps']} steps saved as {kept.connector.name}", now=True)

        room = partial(kept.require_room, again=0 < settings.save_every < steps)
        watch = Watch(previews(model, steps), shown.update, save, room)
        trained = train(model, vae, multimodal_encoder, dataset, settings, clip=clip, state=state, watch=watch)
        lora = trained.snapshot.unet_lora
        changed = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0] if lora else model
        seconds = time.monotonic() - began
        report = f"{describe(trained)}; {seconds:.0f} s; written: {', '.join(written)}{host.guidance_left_out(model)}"
        shown = host.told(cls, report, saved=written)
        return io.NodeOutput(trained.encoder, changed, trained.samples, plot.draw(trained.history), report, ui=shown)


SHELVES = [files.STATES]
NODES = [TrainMultimodal]
