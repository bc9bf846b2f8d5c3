"""All that knows ComfyUI: its models, options and dictionaries. Techniques import this front, as `host`."""

from .areas import Area, whole_grid
from .attention import (
    attention_dtype,
    biased_attention,
    chunk_rows,
    layer_key,
    replace_attention,
    run_attention,
)
from .call import ModelCall, Prompt, Run, Window, acts, call_of, each_run, observe, require_span, run_of
from .gradient import with_fixed_controls
from .layers import SELF_ATTENTION, Part, chosen_self_attention, read_parts
from .masks import picture_rows
from .model import (
    AttentionLayer,
    Grid,
    LayerKey,
    Place,
    blocks,
    conditioning_fingerprint,
    cross_attention_layers,
    layout_fingerprint,
    places,
    require_unet,
    self_attention_layers,
    self_attention_modules,
    single_device,
    transformer_parts,
)
from .sampling import OF_A_NODE, VisitLevels, sample
from .trajectory import Trajectory, latents_at, nearest_level, renoised
from .ui import ProgressText, node_id, show_text

__all__ = [
    "OF_A_NODE",
    "SELF_ATTENTION",
    "Area",
    "AttentionLayer",
    "Grid",
    "LayerKey",
    "ModelCall",
    "Part",
    "Place",
    "ProgressText",
    "Prompt",
    "Run",
    "Trajectory",
    "VisitLevels",
    "Window",
    "acts",
    "attention_dtype",
    "biased_attention",
    "blocks",
    "call_of",
    "chosen_self_attention",
    "chunk_rows",
    "conditioning_fingerprint",
    "cross_attention_layers",
    "each_run",
    "latents_at",
    "layer_key",
    "layout_fingerprint",
    "nearest_level",
    "node_id",
    "observe",
    "picture_rows",
    "places",
    "read_parts",
    "renoised",
    "replace_attention",
    "require_span",
    "require_unet",
    "run_attention",
    "run_of",
    "sample",
    "self_attention_layers",
    "self_attention_modules",
    "show_text",
    "single_device",
    "transformer_parts",
    "whole_grid",
    "with_fixed_controls",
]
