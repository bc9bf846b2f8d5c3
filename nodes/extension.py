"""What the host is given: the list of nodes, and the folder where tuned embeddings live."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import files
from .inversion import Invert
from .kv_inversion import ApplyKV, LoadKV, PromptLines, SaveKV, TuneKV


class Palimpsest(ComfyExtension):
    """The pack."""

    async def on_load(self) -> None:
        """Register our model folder before the first node list is built."""
        files.register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node, in the order of a typical graph."""
        return [Invert, TuneKV, ApplyKV, SaveKV, LoadKV, PromptLines]
