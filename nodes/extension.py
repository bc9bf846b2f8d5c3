"""What the host is given: the nodes of every technique, the folders where learned things live, the pictures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from comfy_api.latest import ComfyExtension, io

from . import border, examples

# Techniques in the order of a typical graph, which is that of the node list and of README's table; others come behind.
ORDER = (
    "inversion", "kv", "words", "cross_attention", "attention_map", "feature_blend", "keep_outside", "contextdiff",
    "video", "attention_fusion", "multimodal", "instruction", "captions", "lora", "exact_text", "text_control",
    "instruction_training", "edit_report",
)  # fmt: skip


def found() -> tuple[ModuleType, ...]:
    """`nodes.py` of every technique's package beside this file: its NODES, and its SHELVES where it keeps files."""
    names = [path.parent.name for path in sorted(Path(__file__).parent.glob("*/nodes.py"))]
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return tuple(import_module(f".{name}.nodes", __package__) for name in names)


TECHNIQUES = found()


def register_folders() -> None:
    """Tell the host about every folder of ours; before the first node list is built, for loaders list their files."""
    for technique in TECHNIQUES:
        for shelf in getattr(technique, "SHELVES", ()):
            shelf.register()


class Palimpsest(ComfyExtension):
    """The pack."""

    async def on_load(self) -> None:
        """Register our model folders, and put the templates' pictures where Load Image finds them."""
        import folder_paths

        register_folders()
        examples.offer(folder_paths.get_input_directory())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node with its border, in the order of a typical graph."""
        return [border.guarded(node) for technique in TECHNIQUES for node in technique.NODES]
