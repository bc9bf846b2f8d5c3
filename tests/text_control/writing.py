"""Small random text controls, lines and VAEs for the tests."""

from __future__ import annotations

import tiny_models
import torch
from palimpsest.nodes.exact_text import TextLine, TextLines
from palimpsest.nodes.text_control import files
from palimpsest.nodes.text_control.control import Layout, TextControl, build

BOX = ((8.0, 8.0), (56.0, 8.0), (56.0, 32.0), (8.0, 32.0))


def lines(height=64, width=64, seed=0, texts=("CAT",)):
    """Lines at random glyphs, all of them in one box."""
    drawn = torch.Generator().manual_seed(seed)
    positions = torch.zeros(1, height, width)
    positions[:, 8:32, 8:56] = 1
    glyphs = torch.rand(1, 2 * height, 2 * width, generator=drawn).round()
    strips = torch.rand(len(texts), 80, 512, generator=drawn).round()
    polygon = torch.tensor(BOX)
    return TextLines(tuple(TextLine(text, polygon) for text in texts), glyphs, positions, strips, (height, width))


def network(model=None, seed=11, gain=1.0):
    """A random control for a tiny model, whose zero convolutions are not zero; gain 0: they are."""
    layout = Layout.of(model or tiny_models.unet())
    torch.manual_seed(seed)
    with torch.inference_mode():
        made = build(layout, torch.float32)
        tiny_models.fill(made)
        for name, weight in made.named_parameters():
            if name.startswith("input_hint_block.") and weight.ndim > 1:
                weight.mul_(6)  # so that letters are not lost on their way through nine layers
            if name.startswith(("zero_convs.", "middle_block_out.")):
                weight.mul_(gain)
    return made


def control(model=None, **given):
    return TextControl.of(network(model, **given))


def published(layout, seed=0, projection="proj.", reader=None, dtype=torch.float16):
    """A checkpoint of random numbers by AnyText's names, with weights of a U-Net beside them."""
    drawn = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return (0.1 * torch.randn(shape, generator=drawn)).to(dtype)

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in build(layout, torch.float32, "meta").state_dict().items()}
    found = {f"control_model.{name.removeprefix('input_hint_block.')}": numbers(*s) for name, s in shapes.items()}
    found |= {f"embedding_manager.{projection}weight": numbers(layout.context_dim, files.NECK)}
    found |= {f"embedding_manager.{projection}bias": numbers(layout.context_dim)}
    return found | {"model.diffusion_model.out.2.weight": numbers(4, 8, 3, 3)} | (reader or {})
