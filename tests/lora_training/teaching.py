"""Short trainings of a LoRA on tiny models, as their tests need them."""

from __future__ import annotations

import comfy.ops
import comfy.sd
import folder_paths
import tiny_models
import torch
from attention_fusion.fusing import CLIPS, Target
from palimpsest.nodes.lora import files
from palimpsest.nodes.lora.nodes import TrainLoRA

WIDTHS = {"sd15": 24, "sdxl": 12}  # of one text encoder: the tiny U-Nets read 24 numbers a token
CAPTIONS = ("a cat", "a dog", "a (bird)", "a long one")
LISTS = ("images", "captions", "masks", "class_images")
SHORT = {
    "epochs": 2, "repeats": 2, "resolution": 64, "rank": 4, "alpha": 4.0, "learning_rate": 1e-2, "text_rate": 1e-3,
    "preview_every": 0, "save_every": 0, "checkpointing": False,
}  # fmt: skip


class SmallVAE(tiny_models.AveragingVAE):
    def decode(self, latent):
        """(B, 4, H, W) -> IMAGE of 8 times the size."""
        colours = (latent[:, :3] / 8 + 0.5).clamp(0, 1)
        return torch.nn.functional.interpolate(colours, scale_factor=8).movedim(1, -1)


def text_encoder(family="sd15"):
    """A host CLIP with random weights, as wide as the tiny U-Nets."""
    model, tokenizer = CLIPS[family]
    small = {"hidden_size": WIDTHS[family], "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    options = {f"clip_{name}_model_config": small for name in "lg"}
    torch.manual_seed(3)
    with torch.inference_mode():
        clip = comfy.sd.CLIP(Target(model, tokenizer), model_options=options)
        if family == "sdxl":  # whose U-Net reads 1280 numbers of a text as a whole
            wide = comfy.ops.manual_cast.Linear(WIDTHS[family], 1280, bias=False, dtype=torch.float32)
            clip.cond_stage_model.clip_g.transformer.text_projection = wide
        tiny_models.fill(clip.cond_stage_model)
    return clip


def pictures():
    """Four pictures of two sizes."""
    return [*(tiny_models.picture(seed=i) for i in range(3)), tiny_models.picture(height=64, width=150, seed=9)]


def execute_on_lists(node, lists, values):
    """Run a node as the host does, on lists: what is in `lists` as it is, the rest as lists of one."""
    schema = node.define_schema().inputs
    usual = {i.id: i.options[0] if getattr(i, "options", None) else getattr(i, "default", None) for i in schema}
    chosen = {name: value for name, value in (usual | values).items() if value is not None}
    with torch.inference_mode():
        return node.execute(**{name: value if name in lists else [value] for name, value in chosen.items()}).args


def teach(model, clip, **changes):
    """(model, clip, plot, sheet, report, file)."""
    values = {"model": model, "clip": clip, "vae": SmallVAE(), "images": pictures(), "captions": list(CAPTIONS)}
    return execute_on_lists(TrainLoRA, LISTS, values | SHORT | changes)


def use_folders(monkeypatch, folder, names=("loras", files.STATES.folder)):
    """Let LoRAs and states, or the files of other shelves, go to a folder of the test."""
    for name in names:
        (folder / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder / name)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
