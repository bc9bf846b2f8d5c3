"""What the host is given: the list of nodes, and the folders where learned things live."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention_map.nodes import AttentionMap, FindWords, ReadAttentionMap
from .contextdiff import files as context_files
from .contextdiff.nodes import ContextSampler, LoadContextAdapter, SaveContextAdapter
from .contextdiff.train_node import TrainContextAdapter
from .cross_attention.nodes import CrossAttentionMask
from .edit_report.nodes import EditReport
from .feature_blend import files as feature_blend_files
from .feature_blend.nodes import FeatureBlend, LoadBlendWeights, SaveBlendWeights, TuneFeatureBlend
from .inversion.nodes import Invert
from .keep_outside.nodes import KeepOutside
from .kv import files as kv_files
from .kv.nodes import ApplyKV, LoadKV, PromptLines, SaveKV, TuneKV
from .multimodal import files as multimodal_files
from .multimodal.dataset import files as multimodal_dataset_files
from .multimodal.dataset.nodes import BuildMultimodalDataset
from .multimodal.nodes import LoadMultimodalEncoder, MultimodalPrompt
from .multimodal.training import files as multimodal_training_files
from .multimodal.training.nodes import TrainMultimodal
from .video.nodes import AttentionFusion, VideoAttention
from .words.nodes import SelectWords


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
