"""KV Inversion without learning: the source's own keys and values, as mode extend shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import host, inputs
from .embeddings import HOLDS, SOURCE, KVEmbeddings
from .settings import TuneSettings
from .store import FinishedSteps
from .tuned_attention import RecordInputs, TunedAttention, TuningState
from .tuning import learning_layers, require_whole_pictures


def record(
    model: Any,
    trajectory: host.Trajectory,
    positive: list,
    settings: TuneSettings,
    *,
    report: Callable[[int, int], None] = lambda *_: None,
    callback: Any = None,
) -> KVEmbeddings:
    """What the layers' to_k and to_v are fed at each latent that the picture was inverted through.

    One pass of the prompt's row a step, without a gradient: the host keeps as much of the model loaded as for any
    sampling. A tuning takes it from the path that it rebuilds; the inverted path itself needs no rebuilding.
    report(done, of). Raises ValueError for another architecture than the trajectory's and for models spread over
    several GPUs.
    """
    host.require_one_gpu(model)
    layers = learning_layers(model, settings)
    inputs.require_same_layout(
        model, trajectory.layout, "the trajectory was recorded", "invert the picture with this model"
    )
    require_whole_pictures(positive, None)
    patched, state, keys = model.clone(), TuningState(), frozenset(layer.key for layer in layers)
    host.replace_attention(patched, "attn1", layers, lambda previous: TunedAttention(keys, state, previous))
    patched.set_model_attn1_patch(RecordInputs(keys, state))
    finished = FinishedSteps(trajectory.steps, {layer.key: layer.channels for layer in layers}, settings)
    steps = settings.recorded(trajectory.steps)

    def keep(number: int, denoised: Tensor, x: Tensor, total: int) -> None:
        finished.note_layers(state)
        finished.keep_source(steps[number], state)
        report(number + 1, len(steps))
        if callback is not None:
            callback(number, denoised, x, total)

    visit = host.VisitLevels(trajectory.latents[steps])
    sigmas = torch.tensor([*(trajectory.sigmas[step] for step in steps), 0.0])
    start = model.model.process_latent_out(trajectory.latents[0].clone())
    host.sample(patched, visit, start, sigmas=sigmas, positive=positive, callback=keep)
    return finished.embeddings(trajectory, start, {HOLDS: [SOURCE], "iterations": 0})
