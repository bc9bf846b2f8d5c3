"""What a step of Train Multimodal Encoder costs, counted on full-size models without weights: its help page's table."""

import pytest
import torch
from benchmarks import counting
from palimpsest.kernels.connector import ConnectorConfig
from palimpsest.nodes import host
from palimpsest.nodes.host.checkpointing import checkpointed
from palimpsest.nodes.multimodal.encoder import build, context_width
from palimpsest.nodes.multimodal.training.gradient import UNet
from palimpsest.nodes.multimodal.training.lora import unet_factors
from palimpsest.nodes.multimodal.training.settings import TrainSettings

LANGUAGE = 4096  # channels of Idefics2
TOKENS = 4 * 324 + 40  # four pictures of the first stage, and words


def connector(model):
    width = context_width(model)
    return build(ConnectorConfig(LANGUAGE, width, 16, width // 64), device="meta").requires_grad_(True)


class Step:
    """A host sampler function: a training step of one picture, counted."""

    def __init__(self, unet, network):
        self.unet, self.network, self.cost = unet, network, counting.Cost()

    def __call__(self, model, x, sigmas, extra_args, *_, **__):
        self.unet.running(model, extra_args or {})
        weights = torch.nn.ModuleList([self.unet.host_model.model, self.network])
        with torch.enable_grad(), counting.counting(weights) as counter:
            states = torch.zeros(1, TOKENS, LANGUAGE, device="meta")
            token_mask = x.new_ones(1, TOKENS, dtype=torch.bool)
            context = self.network(states, token_mask)[0]
            denoised = self.unet.predict(x, x.new_ones(1), context, token_mask, torch.zeros(1, 1280))
            loss = denoised.float().pow(2).mean()
            # Not loss.backward(), in which counting.OneAttention would not see what is run again.
            torch.autograd.graph._engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        self.cost = counter.cost
        return x


def step(model, family, checkpointing, lora=False):
    """(bytes kept for the gradient, FLOPs in those of a model call without guidance)."""
    network, factors = connector(model), None
    if checkpointing:
        for block in network.blocks:
            block.forward = checkpointed(block.forward)
    if lora:
        factors = unet_factors(model, 8, 0)
        factors.to("meta")
    unet = UNet(model, factors, TrainSettings(checkpointing=checkpointing, train_unet=lora))
    count = Step(unet, network)
    with torch.inference_mode(False), counting.meta_host():
        host.sample(unet.patched(), count, family.latent(), sigmas=torch.tensor((1.0, 0.0)), positive=family.prompt(1))
    return count.cost


@pytest.mark.parametrize(
    ("name", "checkpointing", "lora", "kept", "calls"),
    [
        ("SDXL", True, False, 0.7e9, 4.1),
        ("SDXL", False, False, 8.4e9, 3.1),
        ("SDXL", False, True, 10.8e9, 3.4),
        ("SD 1.5", True, False, 0.24e9, 4.7),
        ("SD 1.5", False, False, 1.9e9, 3.6),
    ],
)
def test_a_step_keeps_and_computes_what_the_help_page_says(name, checkpointing, lora, kept, calls):
    """kept: without the one block that is made again at a time, with checkpointing."""
    family = counting.FAMILIES[name]
    model = counting.build(family)
    with torch.inference_mode(), counting.meta_host() as answers:
        plain, prompt = counting.CountCall(model.model, answers), family.prompt(TOKENS)
        host.sample(model, plain, family.latent(), sigmas=torch.tensor((1.0, 0.0)), positive=prompt)
    cost = step(model, family, checkpointing, lora)
    print(name, checkpointing, lora, cost.saved / 1e9, cost.flops / plain.cost.flops)
    assert cost.saved == pytest.approx(kept, rel=0.05)
    assert cost.flops / plain.cost.flops == pytest.approx(calls, abs=0.06)


@pytest.mark.parametrize(("name", "weights"), [("SDXL", 0.81e9), ("SD 1.5", 0.12e9)])
def test_a_connector_is_as_large_as_the_help_page_says(name, weights):
    network = connector(counting.build(counting.FAMILIES[name]))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(weights, rel=0.03)
