"""The values with which the pack's nodes run on small models: the pocket model, and the tiny random ones.

The nodes' own defaults are those of the literature for SD 1.5 and SDXL. What is measured, drawn or tested here, on
pictures of 128 pixels, is set by this table, whatever those defaults become.
"""

from __future__ import annotations

from typing import Any

POCKET: dict[str, dict[str, Any]] = {
    "PalimpsestInvert": {"steps": 20},
    "PalimpsestTuneKV": {"guidance": 3.0, "learning_rate": 0.1},
    "PalimpsestApplyKV": {"source_guidance": 10.0, "start_percent": 0.0},
    "PalimpsestFeatureBlend": {"blend_latents_until": 0.8},
    "PalimpsestTuneFeatureBlend": {"guidance": 3.0},
    "PalimpsestAttentionFusion": {"layers": "all"},
    "PalimpsestTrainContextAdapter": {"learning_rate": 0.0005},
}


def of(node: Any) -> dict[str, Any]:
    """What the table says of a node class."""
    return POCKET.get(node.define_schema().node_id, {})


def widgets(node: Any, **chosen: Any) -> dict[str, Any]:
    """All of a node's widget values: as a new graph has them, with the table's, and those chosen, before them."""
    shown = {}
    for entry in node.define_schema().inputs:
        options = getattr(entry, "options", None)
        if getattr(entry, "default", None) is not None or options:
            shown[entry.id] = entry.default if entry.default is not None else options[0]
    return shown | of(node) | chosen
