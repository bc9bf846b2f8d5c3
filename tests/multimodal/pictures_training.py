"""Draw the pictures of the help pages of Build Multimodal Dataset and Train Multimodal Encoder.

python dev.py draw multimodal

The training is a few steps of a small random language model, to show what the node gives; it draws nothing yet.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tiny_vlm
import torch
from benchmarks import pocket_host
from make_pictures import CELL, ROOT, panels, save
from palimpsest.nodes import plots
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal.dataset import contact_sheet
from palimpsest.nodes.multimodal.encoder import MultimodalEncoder
from palimpsest.nodes.multimodal.training import plot as multimodal_plot
from palimpsest.nodes.multimodal.training import training as multimodal_training
from palimpsest.nodes.multimodal.training.settings import TrainSettings
from palimpsest.nodes.multimodal.vlm import load_vlm
from PIL import ImageOps
from pocket import world

SCENES, SHOWN, STEPS = 12, 2, 24
DOCS = ROOT / "web" / "docs"


def drawn_dataset(folder: Path) -> interleaved_dataset.Dataset:
    """Drawn animals, cut out by the masks that the renderer knows."""
    pictures, captions, masks, words = [], [], [], []
    for scene in world.held_out_scenes(SCENES):
        picture, mask = world.render(scene, with_mask=True)
        pictures.append(torch.from_numpy(np.asarray(picture)).float() / 255)
        masks.append(torch.from_numpy(np.asarray(mask))[None])
        captions.append(world.caption(scene))
        words.append((scene.species,))
    folder.mkdir()
    finder = interleaved_dataset.ByMask(masks, words)
    recipe = interleaved_dataset.Recipe(min_side=20)
    return interleaved_dataset.build_dataset(folder, pictures, captions, finder, recipe)[0]


def main() -> None:
    """Write web/docs/PalimpsestBuildMultimodalDataset/*.jpg and web/docs/PalimpsestTrainMultimodal/*.jpg."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        dataset = drawn_dataset(Path(place) / "animals")
        rows = (contact_sheet.row_of(dataset, index) for index in range(SHOWN))
        cells = [
            (ImageOps.pad(plots.to_image(picture), (CELL, CELL), color="white"), row.text if i == 0 else text)
            for row in rows
            for i, (picture, text) in enumerate(row.cells)
        ]
        print(save(panels(cells), DOCS / "PalimpsestBuildMultimodalDataset" / "contact_sheet.jpg"))
        vlm = load_vlm(tiny_vlm.write(Path(place) / "vlm"), "float32")
        model, _, vae = pocket_host.load_pocket(narrow=True)
        settings = TrainSettings(
            steps=STEPS, batch_size=2, tokens=16, depth=2, connector_rate=1e-3, warmup=4, preview_every=0, save_every=0
        )
        trained = multimodal_training.train(model, vae, MultimodalEncoder(vlm), dataset, settings)
        print(multimodal_training.describe(trained))
        plot = plots.to_image(multimodal_plot.draw(trained.history)[0])
        print(save(plot, DOCS / "PalimpsestTrainMultimodal" / "plot.jpg"))
