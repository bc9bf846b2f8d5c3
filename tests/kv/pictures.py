"""Draw the pictures of KV Inversion's help pages, settings side by side.

python dev.py draw kv
"""

from __future__ import annotations

from make_pictures import ROOT, draw_knobs


def main() -> None:
    """Write web/docs/Palimpsest{TuneKV,ApplyKV,PromptLines}/*.jpg."""
    for path in draw_knobs():
        print(path.relative_to(ROOT))
