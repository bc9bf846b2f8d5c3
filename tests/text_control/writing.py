"""Small random text controls, lines and VAEs for the tests."""

from __future__ import annotations

import tiny_models
import torch
from palimpsest.nodes.exact_text import TextLine, TextLines, shipped_recogniser
from palimpsest.nodes.text_control import files, keeping
from palimpsest.nodes.text_control.control import Layout, TextControl, build
from safetensors.torch import save_file

POCKET = Layout(num_res_blocks=[1, 1], channel_mult=[1, 1], transformer_depth=[1, 1])  # of the pocket model's U-Net
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


def save_control(path, made):
    """A file of a network, with embeddings that are zero."""
    width = made.layout.context_dim
    projection = {"weight": torch.zeros(width, files.NECK), "bias": torch.zeros(width)}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = keeping.content(made.state_dict(), projection, shipped_recogniser())
    header = {"format": files.CONTROLS.format, "version": str(files.CONTROLS.version)}
    save_file(content, path, metadata=header | keeping.header_of(made.layout, {"steps": 0}))


def pocket_control(path):
    """A text control for the pocket model that changes nothing: all of it is zero."""
    made = build(POCKET, torch.float16)
    made.load_state_dict({name: torch.zeros_like(weight) for name, weight in made.state_dict().items()})
    save_control(path, made)


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
