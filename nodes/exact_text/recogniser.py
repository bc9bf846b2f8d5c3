"""The recogniser that comes with the pack: PP-OCRv3's, and the alphabet it reads."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.text_recognition import CLASSES, Recogniser

FILE = Path(__file__).resolve().parent / "weights" / "pp_ocrv3_recogniser.safetensors"
UNREADABLE = (OSError, RuntimeError, SafetensorError)


@functools.cache
def shipped_recogniser() -> Recogniser:
    """PP-OCRv3's recogniser in float32, frozen; read once. Raises ValueError where its file is gone or damaged.

    Gradients reach its pixels wherever it was read first: its weights are no inference tensors.
    """
    with torch.device("meta"):
        network = Recogniser()
    try:
        with torch.inference_mode(False), safe_open(FILE, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            network.load_state_dict(tensors, assign=True)
    except UNREADABLE as error:
        raise damaged(error) from error
    return network.requires_grad_(False)


@functools.cache
def alphabet() -> tuple[str, ...]:
    """The recogniser's characters by index: "" for the blank, Chinese, Latin and others, the space last."""
    try:
        with safe_open(FILE, framework="pt", device="cpu") as file:
            found = ("", *(file.metadata() or {}).get("characters", "").split("\n"), " ")
    except UNREADABLE as error:
        raise damaged(error) from error
    if len(found) != CLASSES:
        raise damaged(f"{len(found)} characters instead of {CLASSES}")
    return found


def damaged(why: object) -> ValueError:
    """What to raise where the pack's own file cannot be read."""
    return ValueError(
        f"the pack's reader {FILE.name} cannot be read ({why}): install Palimpsest again, whole, with its folder "
        "nodes/exact_text/weights."
    )
