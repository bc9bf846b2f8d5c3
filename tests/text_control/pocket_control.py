"""The pocket's text control: half as wide as its checkpoint asks for, packed in 8 bits, and as a file that loads."""

from __future__ import annotations

from pathlib import Path

import torch
from pocket import checkpoint, text_encoder, train
from text_control.writing import POCKET
from torch import Tensor, nn

CONTROL, PROJECTION = "control.", "projection."
TEMPERATE = 320  # sinusoids that the time embedding of the full layout reads; the narrow one reads as many
OUTSIDE = ("input_hint_block.glyph_block.", "input_hint_block.position_block.")  # as wide in every control


def build(width: int = train.WIDTH) -> nn.Module:
    """The pack's control for the pocket's U-Net, its weights not filled; narrow as train.build_unet is."""
    from dataclasses import replace

    import comfy.ops
    from palimpsest.nodes.text_control import control

    network = control.build(replace(POCKET, model_channels=width), torch.float32, "cpu")
    if width != TEMPERATE:
        network.model_channels = TEMPERATE
        network.time_embed[0] = comfy.ops.disable_weight_init.Linear(TEMPERATE, 4 * width)
    return network


def widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The control of the full width that says the same: as checkpoint.widen, but that glyphs and places stay."""
    same = {name: value.float() for name, value in state.items() if name.startswith(OUTSIDE)}
    fuse = "input_hint_block.fuse_block."
    wide = {name: value.float().repeat_interleave(2, 0) for name, value in state.items() if name.startswith(fuse)}
    rest = {name: value for name, value in state.items() if name not in same and name not in wide}
    return checkpoint.widen(rest) | wide | same


def save(path: Path, control: dict[str, Tensor], projection: dict[str, Tensor], told: dict[str, str]) -> None:
    """Store both in 8 bits."""
    parts = {CONTROL + name: value for name, value in control.items()}
    parts |= {PROJECTION + name: value for name, value in projection.items()}
    train.save_weights(path, checkpoint.pack(parts), told)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """(control, projection) in float32 and what the file says of itself."""
    state, told = checkpoint.load_weights(path)
    control, projection = (
        {name.removeprefix(part): value.float() for name, value in state.items() if name.startswith(part)}
        for part in (CONTROL, PROJECTION)
    )
    return control, projection, told


def narrow(path: Path):
    """(CONTROL_NET, TEXT_EMBEDDER) for the narrow U-Net of a packed file."""
    from palimpsest.nodes import exact_text
    from palimpsest.nodes.text_control.control import TextControl

    control, projection, _ = load(path)
    network = build()
    network.load_state_dict(control)
    return TextControl.of(network), exact_text.TextEmbedder(exact_text.shipped_recogniser(), projection)


def write_full(path: Path, out: Path) -> None:
    """The file for the pocket's checkpoint, as Train Text Control would have saved it, of a packed one."""
    from palimpsest.nodes import exact_text
    from palimpsest.nodes.text_control import files, keeping
    from safetensors.torch import save_file

    control, projection, told = load(path)
    content = keeping.content(widen(control), projection, exact_text.shipped_recogniser())
    header = {"format": files.CONTROLS.format, "version": str(files.CONTROLS.version)}
    header |= keeping.header_of(POCKET, {"steps": int(told.get("steps", 0))})
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, out, metadata=header)


def first_projection(star: int, seed: int = 0) -> dict[str, Tensor]:
    """LayerNorm(Linear) whose embeddings begin as the placeholder's own, with a little of each line's look."""
    from palimpsest.nodes.text_control.files import NECK

    table = text_encoder.state_dict()["embeddings.token_embedding.weight"]
    width, drawn = text_encoder.WIDTH, torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(width, NECK, generator=drawn) / NECK**0.5,
        "bias": torch.zeros(width),
        "norm_weight": torch.full((width,), 0.3),
        "norm_bias": table[star].float().clone(),
    }
