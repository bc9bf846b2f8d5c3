"""Context adapters that act without a training, what they see with, and a flow-matching model."""

import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.model_sampling
import folder_paths
import tiny_models
import torch
from palimpsest.nodes.contextdiff import files
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.network import AdapterConfig, closed

WIDTH = tiny_models.SD15["context_dim"]
SEEING = {"kind": "CLIP of x0_hat", "vision_width": 24}


def use_folder(monkeypatch, root, **folders):
    """An empty models/palimpsest_context below `root`, and other folders of the host's table: (paths, endings)."""
    monkeypatch.setattr(folder_paths, "models_dir", str(root))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    files.SHELF.register()
    return root / files.SHELF.folder


def adapter(model, random=0.3, info=None, sight=None, **config):
    """An adapter that acts: an untrained one with a random last layer of this size. 0: untrained."""
    settings = {"width": 32, "depth": 1, "heads": 4} | config
    made = ContextAdapter.new(AdapterConfig.for_model(model, WIDTH, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.patcher.model.named_parameters():
        if closed(name.removesuffix(".weight")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * random)
    return ContextAdapter(made.config, made.patcher, info or {}, sight)


def flow(model):
    """The tiny U-Net with the sampling of a flow-matching model."""
    model = model.clone()
    kind = type(
        "Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {}
    )  # as the host's ModelSampling nodes do
    model.add_object_patch("model_sampling", kind(model.model.model_config))
    return model


def vision(width=24, kind="clip_vision_model"):
    """A CLIP_VISION of the host's own class, small and random: 5 tokens of this width."""
    config = {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": width,
        "intermediate_size": 32, "layer_norm_eps": 1e-5, "num_attention_heads": 2, "num_hidden_layers": 2,
        "num_channels": 3, "image_size": 28, "patch_size": 14, "projection_dim": 16,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # older hosts read it from a file alone
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        model = comfy.clip_vision.ClipVisionModel(str(path))
    model.model_type = kind
    torch.manual_seed(0)
    with torch.no_grad():
        tiny_models.fill(model.model)
    return model


class Colours(tiny_models.AveragingVAE):
    """A VAE both ways: each latent pixel's first three channels are the colour of 8 x 8 pixels."""

    def __init__(self):
        self.decoded = 0

    def decode(self, latent):
        self.decoded += len(latent)
        colours = ((latent[:, :3].float() + 4) / 8).clamp(0, 1)
        return colours.repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)
