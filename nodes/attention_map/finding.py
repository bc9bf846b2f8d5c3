"""Words in a picture that was inverted: the model looks at its own latents, without sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .. import host, inputs
from ..settings import Settings
from ..words import ChosenWords, refuse_without_words
from .record import AttentionRecord, span
from .recorder import RecordSettings, record_words


@dataclass(frozen=True)
class FindSettings(Settings):
    """How often the model looks, and in which span of the trajectory's steps; see PalimpsestFindWords."""

    looks: int = 5
    start_percent: float = 0.5
    end_percent: float = 1.0


def find_words(
    model: Any,
    trajectory: host.Trajectory,
    words: ChosenWords,
    positive: list,
    settings: FindSettings,
    callback: Any = None,
) -> AttentionRecord:
    """Where words of a prompt are in a picture: the model looks at its inverted latents, `looks` times.

    Raises ValueError for another architecture's trajectory, an empty span, and a prompt without the words.
    """
    inputs.require_same_layout(model, trajectory.layout, "the picture was inverted", "invert it again with this model")
    refuse_without_words((beside for _, beside in positive), "Find Words in Picture")
    host.require_span(settings.start_percent, settings.end_percent)
    steps = spread(settings.looks, trajectory.steps, settings.start_percent, settings.end_percent)
    host.require_active(model, positive, [trajectory.sigmas[step] for step in steps], "positive")
    patched, record = record_words(model, words, RecordSettings(), needs_samples=False)
    sigmas = torch.tensor([*(trajectory.sigmas[step] for step in steps), 0.0])
    picture = model.model.process_latent_out(host.as_sampled(model, trajectory.latents[-1].clone()))
    visit = host.VisitLevels(trajectory.latents[steps])
    host.sample(patched, visit, picture, sigmas=sigmas, positive=positive, callback=callback)
    record.of(None)
    return record


def spread(looks: int, steps: int, start: float, end: float) -> list[int]:
    """Which of `steps` steps to visit: `looks` of them, evenly spread over a span of the steps, each once."""
    within = span(steps, start, end)
    wanted = min(looks, len(within))
    return [within[math.floor((i + 0.5) * len(within) / wanted)] for i in range(wanted)]
