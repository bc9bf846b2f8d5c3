"""Draw the picture of Train Instruction's help page: what the pocket model makes of a picture while it learns an edit.

python dev.py draw instruction_training
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
from graphs.titles import thumbnail_of
from instruction_training.benchmark import build
from instruction_training.graph import TITLE
from make_pictures import ROOT, Studio, panels, save, thumbnail
from PIL import Image
from pocket import checkpoint, world

EDIT = {
    "steps": 360, "batch_size": 2, "accumulation": 1, "rank": 16, "alpha": 16.0, "learning_rate": 2e-3,
    "resolution": 128, "save_every": 0, "preview_every": 120, "text_guidance": 3.0, "checkpointing": False,
    "keep_state": "none", "held_out": 1, "min_snr_gamma": 5.0,
}  # fmt: skip
ASKED, COUNT, SHOWN = "make it winter", 24, (120, 360)
SEED = 7003  # of the scenes


def edit_model(studio: Studio, weights: Path = checkpoint.WEIGHTS / checkpoint.UNET):
    """The pocket's narrow U-Net with channels for a picture, blank where its weights have none, in the host."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    state, _ = checkpoint.load_weights(weights)
    network, old = build(state), studio.model.model.model_config
    config = comfy.supported_models.SD15_instructpix2pix(old.unet_config | {"in_channels": 8})
    config.unet_config = old.unet_config | {"in_channels": 8}
    base = comfy.model_base.SD15_instructpix2pix(config, device="meta")
    network.dtype, network.in_channels = studio.torch.float32, 8
    base.diffusion_model = network.eval().requires_grad_(False)
    return comfy.model_patcher.CoreModelPatcher(base, studio.model.load_device, studio.model.offload_device)


def teach(studio: Studio):
    """The node on scenes and the same in the snow: (model, history, examples shown, report)."""
    import folder_paths
    from palimpsest.nodes.instruction_training import nodes as training_nodes
    from palimpsest.nodes.instruction_training import training

    for name in ("loras", "diffusion_models"):
        folder_paths.folder_names_and_paths[name] = ([tempfile.mkdtemp()], {".safetensors"})
    found = (world.sample_scene(np.random.default_rng([SEED, number])) for number in itertools.count())
    scenes = list(itertools.islice((scene for scene in found if scene.place != "snow"), COUNT))
    drawn = np.stack([world.render(scene) for scene in scenes])
    results = np.stack([world.render(world.edit(scene, place="snow")) for scene in scenes])
    kept, real, model = [], training.train, edit_model(studio)

    def train(*given, **named):
        kept.append((real(*given, **named), given[3]))
        return kept[-1][0]

    training.train = train
    try:
        single = {"model": model, "clip": studio.clip, "vae": studio.vae, "filename": "winter", "instructions": ASKED}
        chosen = studio.defaults(training_nodes.TrainInstruction) | EDIT | single
        images = {"pictures": drawn, "results": results}
        given = {name: [value] for name, value in chosen.items()}
        given |= {name: [studio.torch.from_numpy(values).float() / 255] for name, values in images.items()}
        report = training_nodes.TrainInstruction.execute(**given).args[3]
    finally:
        training.train = real
    return model, *kept[-1], report


def main() -> None:
    """Write web/docs/PalimpsestTrainInstruction/*.jpg."""
    studio = Studio()
    with studio.torch.inference_mode():
        model, history, shown, report = teach(studio)
        print(report)

        def picture(latent) -> Image.Image:
            pixels = studio.vae.decode(latent)[0].clamp(0, 1)
            return Image.fromarray((pixels * 255).round().byte().numpy())

        def drawn(latent) -> Image.Image:
            return picture(model.model.process_latent_out(latent))

        cells = [(picture(shown[0].source), "a picture that is not learned")]
        cells += [(drawn(p.latents[0]), f"after {p.epoch} steps") for p in history.previews if p.epoch in SHOWN]
        cells += [(drawn(shown[0].latent), "what it should become")]
    save(
        thumbnail(cells[-2][0], cells[0][0]).resize((384, 384), Image.Resampling.LANCZOS),
        thumbnail_of(TITLE),
    )
    save(panels(cells), ROOT / "web" / "docs" / "PalimpsestTrainInstruction" / "sheet.jpg")
