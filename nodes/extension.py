"""What the host is given: the list of nodes, and the folders where learned things live."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    context_files,
    feature_blend_files,
    kv_files,
    multimodal_dataset_files,
    multimodal_files,
    multimodal_training_files,
)
from .attention_map import AttentionMap, FindWords, ReadAttentionMap
from .build_multimodal_dataset import BuildMultimodalDataset
from .context import ContextSampler, LoadContextAdapter, SaveContextAdapter
from .cross_attention_mask import CrossAttentionMask
from .edit_report import EditReport
from .feature_blend import FeatureBlend, LoadBlendWeights, SaveBlendWeights, TuneFeatureBlend
from .inversion import Invert
from .keep_outside import KeepOutside
from .kv_inversion import ApplyKV, LoadKV, PromptLines, SaveKV, TuneKV
from .multimodal import LoadMultimodalEncoder, MultimodalPrompt
from .select_words import SelectWords
from .train_context import TrainContextAdapter
from .train_multimodal import TrainMultimodal
from .video import AttentionFusion, VideoAttention


def register_folders() -> None:
    """Tell the host about every folder of ours; before the first node list is built, for loaders list their files."""
    learned = (kv_files, feature_blend_files, context_files, multimodal_files, multimodal_training_files)
    for files in (*learned, multimodal_dataset_files):
        files.register_folder()


class Palimpsest(ComfyExtension):
    """The pack."""

    async def on_load(self) -> None:
        """Register our model folders."""
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node, in the order of a typical graph."""
        return [
            *(Invert, TuneKV, ApplyKV, SaveKV, LoadKV, PromptLines),
            *(SelectWords, CrossAttentionMask, AttentionMap, FindWords, ReadAttentionMap),
            *(FeatureBlend, TuneFeatureBlend, SaveBlendWeights, LoadBlendWeights, KeepOutside),
            *(TrainContextAdapter, SaveContextAdapter, LoadContextAdapter, ContextSampler),
            *(VideoAttention, AttentionFusion),
            *(LoadMultimodalEncoder, MultimodalPrompt, BuildMultimodalDataset, TrainMultimodal),
            EditReport,
        ]
