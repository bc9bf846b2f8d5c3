"""Context adapters that act without a training, and a flow-matching model."""

import comfy.model_sampling
import tiny_models
import torch
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.network import AdapterConfig, closed

WIDTH = tiny_models.SD15["context_dim"]


def adapter(model, random=0.3, info=None, **config):
    """An adapter that acts: an untrained one with a random last layer of this size. 0: untrained."""
    settings = {"width": 32, "depth": 1, "heads": 4} | config
    made = ContextAdapter.new(AdapterConfig.for_model(model, WIDTH, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.patcher.model.named_parameters():
        if closed(name.removesuffix(".weight")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * random)
    return ContextAdapter(made.config, made.patcher, info or {})


def flow(model):
    """The tiny U-Net with the sampling of a flow-matching model."""
    model = model.clone()
    kind = type(
        "Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {}
    )  # as the host's ModelSampling nodes do
    model.add_object_patch("model_sampling", kind(model.model.model_config))
    return model
