"""LoRAs that trainings leave in the host's own folder, for its loaders."""

from __future__ import annotations

from ..files import Shelf


def lora_shelf(saver: str, room: str) -> Shelf:
    """models/loras, as a node writes to it; room: what to do when the disk is full."""
    return Shelf(folder="loras", format="pt", version=1, what=("a LoRA", saver), example="my clip", room=room)
