"""Draw the picture of Train LoRA's help page: what the pocket model draws while it learns ink drawings.

python dev.py draw lora_training
"""

from __future__ import annotations

import tempfile

from graphs.titles import thumbnail_of
from lora_training import ink
from lora_training.graph import TITLE
from make_pictures import ROOT, Studio, panels, save, thumbnail
from PIL import Image
from pocket import world

STYLE = {
    "epochs": 12, "repeats": 3, "rank": 16, "alpha": 16.0, "learning_rate": 2e-3, "text_rate": 1e-4, "resolution": 128,
    "convolutions": True, "noise_offset": 0.1, "loss_weight": "debiased",
    "save_every": 0, "preview_every": 2, "guidance": 2.0, "checkpointing": False, "keep_state": "none",
}  # fmt: skip
PROMPT = "a blue dog sitting on the left in the park"  # a colour, a pose and a place together that no drawing shows
COUNT, SHOWN = 12, (2, 6, 12)


def teach(studio: Studio, **changes):
    """The node on ink drawings: (history, pictures drawn on the way by epoch, report)."""
    import folder_paths
    from palimpsest.nodes.lora import nodes as lora_nodes
    from palimpsest.nodes.lora import training

    folder_paths.folder_names_and_paths["loras"] = ([tempfile.mkdtemp()], {".safetensors"})
    drawn, captions = ink.drawings(COUNT)
    kept, real = [], training.train

    def train(*given, **named):
        kept.append(real(*given, **named))
        return kept[-1]

    training.train = train
    try:
        chosen = (
            studio.defaults(lora_nodes.TrainLoRA) | STYLE | {"preview_prompts": PROMPT, "filename": "ink"} | changes
        )
        lists = {"images": [studio.torch.from_numpy(drawn)], "captions": captions}
        single = {"model": studio.model, "clip": studio.clip, "vae": studio.vae} | chosen
        given = {name: [value] for name, value in single.items() if name not in lists} | lists
        report = lora_nodes.TrainLoRA.execute(**given).args[4]
    finally:
        training.train = real
    return kept[-1], report


def main() -> None:
    """Write web/docs/PalimpsestTrainLoRA/*.jpg."""
    studio = Studio()
    with studio.torch.inference_mode():
        history, report = teach(studio)
        print(report)

        def picture(latent) -> Image.Image:
            pixels = studio.vae.decode(studio.model.model.process_latent_out(latent))[0].clamp(0, 1)
            return Image.fromarray((pixels * 255).round().byte().numpy())

        example = Image.fromarray(ink.in_ink(world.render(ink.scenes(4)[3])))
        shown = [(example, "one of 12 drawings")]
        shown += [(picture(p.latents[0]), f"after {p.epoch} epochs") for p in history.previews if p.epoch in SHOWN]
    save(
        thumbnail(shown[-1][0], example).resize((384, 384), Image.Resampling.LANCZOS),
        thumbnail_of(TITLE),
    )
    save(panels(shown), ROOT / "web" / "docs" / "PalimpsestTrainLoRA" / "sheet.jpg")
