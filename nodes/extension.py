"""What the host is given: the nodes of every technique, the folders where learned things live, the pictures."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import border, examples
from .attention_fusion import nodes as attention_fusion
from .attention_map import nodes as attention_map
from .captions import nodes as captions
from .contextdiff import nodes as contextdiff
from .cross_attention import nodes as cross_attention
from .edit_report import nodes as edit_report
from .exact_text import nodes as exact_text
from .feature_blend import nodes as feature_blend
from .instruction import nodes as instruction
from .instruction_training import nodes as instruction_training
from .inversion import nodes as inversion
from .keep_outside import nodes as keep_outside
from .kv import nodes as kv
from .lora import nodes as lora
from .multimodal import nodes as multimodal
from .text_control import nodes as text_control
from .video import nodes as video
from .words import nodes as words

# In the order of a typical graph. Each module lists its NODES, and its SHELVES where it keeps files.
TECHNIQUES = (
    inversion,
    kv,
    words,
    cross_attention,
    attention_map,
    feature_blend,
    keep_outside,
    contextdiff,
    video,
    attention_fusion,
    multimodal,
    instruction,
    captions,
    lora,
    exact_text,
    text_control,
    instruction_training,
    edit_report,
)


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
