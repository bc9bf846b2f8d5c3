"""Figure 6 of KV Inversion in small: when the learned keys and values are shown, and in which layers they are learned.

The paper shows pictures for starts of .1, .5 and .9 and for all layers, the encoder, the middle and the decoder; here
are numbers for both, in the two modes that show what was learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from palimpsest.nodes import plots

MODES = ("recompute", "frozen")
STARTS = (0.1, 0.3, 0.5, 0.7, 0.9)
PLACES = ("all", "encoder", "middle", "decoder")
USUAL = "decoder"  # where the starts are compared
CURVES = {"pose": plots.RED, "identity": plots.BLUE, "background": plots.GREEN}
TOP_DB = 30.0  # decibels of the background that reach the top of a plot
WIDTH, HEIGHT, EDGE = 420, 260, 44


def measured(scenes: Any, guidance: float, scored: Callable) -> dict[str, dict[str, dict[str, float]]]:
    """{mode: {start or place: scores}}; the places are compared from the first start on."""
    found = {mode: {} for mode in MODES}
    for place in PLACES:
        kv = scenes.tune(guidance=guidance, layers=place)[0]
        for start in STARTS if place == USUAL else STARTS[:1]:
            for mode in MODES:
                shown = {"mode": mode, "source_guidance": 1.0, "start_percent": start}
                scores = scored(scenes, scenes.with_pose(kv, guidance, **shown))
                if place == USUAL:
                    found[mode][f"from {start:g}"] = scores
                if start == STARTS[0]:
                    found[mode][place] = scores
    return found


def plotted(found: dict[str, dict[str, dict[str, float]]]) -> plots.Tensor:
    """IMAGE (1, H, W, 3): a row for each mode, starts on the left and places on the right."""
    canvas = plots.Canvas.blank(2 * WIDTH, len(found) * HEIGHT + EDGE)
    for row, (mode, scores) in enumerate(found.items()):
        for column, names in enumerate(([f"from {start:g}" for start in STARTS], PLACES)):
            draw_panel(canvas, (column * WIDTH, row * HEIGHT), mode, {name: scores[name] for name in names})
    for i, (curve, colour) in enumerate(CURVES.items()):
        words = f"{curve}, {TOP_DB:g} dB at the top" if curve == "background" else curve
        canvas.text((EDGE + 130 * i, len(found) * HEIGHT + 14), words, colour)
    return canvas.done()


def draw_panel(canvas: plots.Canvas, corner: plots.Point, title: str, scores: dict[str, dict[str, float]]) -> None:
    """One plot of the scores, whose names stand below it."""
    left, top = corner[0] + EDGE, corner[1] + EDGE // 2
    axes = plots.Axes((left, top + 14, left + WIDTH - 2 * EDGE, top + HEIGHT - EDGE), len(scores) - 1, 0.0, 1.0)
    canvas.text((left, top - 4), title)
    for mark in (0.0, 0.5, 1.0):
        canvas.line([axes.at(0, mark), axes.at(axes.last, mark)], plots.SOFT)
        canvas.text((left - 8, axes.at(0, mark)[1]), f"{mark:g}", anchor="rm")
    for place, name in enumerate(scores):
        canvas.text((axes.at(place, 0)[0], axes.box[3] + 6), name, anchor="ma")
    canvas.plot(axes, [plots.Line(curve, colour, points(scores, curve)) for curve, colour in CURVES.items()], dots=True)


def points(scores: dict[str, dict[str, float]], curve: str) -> list[plots.Point]:
    """One curve, decibels as shares of TOP_DB."""
    return [(i, row[curve] / (TOP_DB if curve == "background" else 1.0)) for i, row in enumerate(scores.values())]
