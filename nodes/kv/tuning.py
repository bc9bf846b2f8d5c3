"""KV Inversion, stage 2, inside the host: keys and values fitted to every picture of a trajectory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import host, inputs
from ..host import checkpointing, gradient, rotation
from .embeddings import HOLDS, KVEmbeddings, TunedLayer
from .fitting import FitTrajectory, Report
from .recorded import layers_of, require_learnable
from .settings import TuneSettings, chosen_layers
from .store import FinishedSteps
from .tuned_attention import RecordInputs, TunedAttention, TunedJoint, TuningState

TECHNIQUE = "KV Inversion"
TUNING = "kv tuning"  # of the act on a transformer's attention
USUAL_RANK = 32
BYTES = 20  # of what learns, each number on the device: itself, its gradient, two moments of Adam, the best one yet
SHARE = 0.25  # of a device's memory that may be beside a transformer


def tune(
    model: Any,
    trajectory: host.Trajectory,
    positive: list,
    negative: list | None,
    settings: TuneSettings,
    *,
    report: Report = lambda *_: None,
    callback: Any = None,
    mask: Tensor | None = None,
) -> tuple[KVEmbeddings, Tensor]:
    """Fit KV embeddings to every picture of a trajectory (Algorithm 1, stage 2), all at once and each on its own.

    mask (MASK of any size): learn and rebuild its white part only. Returns the embeddings and the reconstruction as on
    a LATENT socket. Of a transformer's source nothing is kept. The model is left as it was. Raises ValueError for
    another architecture than the trajectory's, models spread over several GPUs, and a clip.
    """
    family = host.family_of(model)
    if family is None:
        layers = learning_layers(model, settings)
    else:
        layers = joint_layers(model, family, trajectory, settings)
        settings = replace(settings, keep_source=False)
    inputs.require_same_layout(
        model, trajectory.layout, "the trajectory was recorded", "invert the picture with this model"
    )
    model = host.single_device(model)
    state = TuningState(mask=tuning_mask(mask, trajectory), others=host.patching_nodes(model))
    require_whole_pictures(positive, negative)
    levels, guidance = trajectory.sigmas, settings.run_guidance
    inputs.require_active(model, levels, guidance, positive=positive, negative=negative)
    training = nullcontext() if family is None else gradient.host_in_training()
    with training, torch.inference_mode(False), host.refused_by_name(model, "Tune KV"):
        controlled = any("control" in extra for _, extra in (*positive, *(negative or ())))
        if family is None:
            patched, prefix = with_tuned_attention(model, layers, state, controlled)
        else:
            patched, prefix = with_tuned_joint(model, family, layers, state, controlled)
        if controlled:
            positive, negative = host.with_fixed_controls(positive, negative)
        finished = FinishedSteps(trajectory.steps, {layer.key: layer.channels for layer in layers}, settings)
        fitting = FitTrajectory(trajectory, state, prefix, finished, settings, report)
        start = model.model.process_latent_out(host.as_sampled(model, trajectory.latents[0].clone()))
        rebuilt = host.sample(
            patched,
            fitting,
            start,
            sigmas=torch.tensor(trajectory.sigmas),
            positive=positive,
            negative=negative,
            guidance=settings.run_guidance,
            callback=callback,
        ).cpu()
    info = {HOLDS: finished.holds, "iterations": fitting.iterations, "losses": [float(loss) for loss in fitting.losses]}
    return finished.embeddings(trajectory, start, info), rebuilt


def learning_layers(model: Any, settings: TuneSettings) -> list[host.AttentionLayer]:
    """The layers of a U-Net that learn. Raises ValueError where this model has none there."""
    layers = chosen_layers(host.self_attention_layers(model, TECHNIQUE), settings.layers)
    if not layers:
        raise ValueError(f"layers is {settings.layers!r}, and this model has no self-attention there: choose others.")
    return layers


def joint_layers(
    model: Any, family: host.Family, trajectory: host.Trajectory, settings: TuneSettings
) -> list[host.AttentionLayer]:
    """The layers of a transformer that learn. Raises ValueError where there are none, and where it cannot learn."""
    require_learnable(family, settings)
    trajectory.require_picture("Tune KV")
    channels = getattr(model.model.diffusion_model, family.width)
    layers = [host.AttentionLayer(*key, channels) for key in layers_of(model, family, settings)]
    require_room(model, family, layers, trajectory, settings)
    return layers


def require_room(
    model: Any,
    family: host.Family,
    layers: list[host.AttentionLayer],
    trajectory: host.Trajectory,
    settings: TuneSettings,
) -> None:
    """Raise ValueError where what learns takes much of the device's memory, before anything runs."""
    import comfy.model_management

    patch, rows = host.patch_of(model.model.diffusion_model), trajectory.pictures * settings.batch_steps
    grid = (-(-side // patch) for side in trajectory.latents.shape[-2:])
    layer = TunedLayer(*layers[0].key, *grid, layers[0].channels)
    needed, lean = (BYTES * 2 * rows * len(layers) * layer.elements(rank) / 1e9 for rank in (settings.rank, USUAL_RANK))
    total = comfy.model_management.get_total_memory(model.load_device) / 1e9
    if needed > SHARE * total:
        raise ValueError(
            f"while a step of {family.name} learns, its keys and values take {needed:.1f} GB at rank {settings.rank}, "
            f"beside the model, and the device has {total:.1f} GB: set rank to {USUAL_RANK} ({lean:.1f} GB), or "
            "inner_steps to 0, which records them."
        )


def tuning_mask(mask: Tensor | None, trajectory: host.Trajectory) -> Tensor | None:
    """The mask of every picture, (pictures, h, w). Raises ValueError for one in which nothing is white."""
    if mask is None:
        return None
    mask = host.as_encoded(mask, trajectory.latents.shape[-2:])
    rows = host.picture_rows(mask, trajectory.pictures, *mask.shape[-2:])[:, 0].clone()
    if not bool((rows.flatten(1).amax(1) > 0).all()):
        raise ValueError("the mask of Tune KV is black all over: nothing would be learned. Paint the subject white.")
    return rows


def require_whole_pictures(positive: list, negative: list | None) -> None:
    """Raise ValueError for prompts that are limited to an area."""
    prompts = [extra for _, extra in (*positive, *(negative or ()))]
    if any("area" in extra or extra.get("set_area_to_bounds") for extra in prompts):
        raise ValueError(
            "the prompt of a tuning describes the whole picture, this one is limited to an area: connect it without "
            "ConditioningSetArea, and masks with set_cond_area default (Apply KV takes such prompts)."
        )


def with_tuned_attention(
    model: Any, layers: list[host.AttentionLayer], state: TuningState, controlled: bool
) -> tuple[Any, gradient.CachedPrefix]:
    """A clone of the model whose layers take K_bar, V_bar from `state`, and its cache of the layers before them.

    controlled: a ControlNet acts. It adds to the prefix's outputs in place, so that they cannot be kept.
    """
    patched, prefix = gradient.prepare(model, layers[0], not controlled)
    keys = frozenset(layer.key for layer in layers)
    host.replace_attention(patched, "attn1", layers, lambda previous: TunedAttention(keys, state, previous))
    patched.set_model_attn1_patch(RecordInputs(keys, state))
    if controlled:
        # The host adds a ControlNet to the skips in place, after the next block has saved them for its gradient.
        patched.set_model_input_block_patch_after_skip(lambda h, _: h.clone())
    return patched, prefix


def with_tuned_joint(
    model: Any, family: host.Family, layers: list[host.AttentionLayer], state: TuningState, controlled: bool
) -> tuple[Any, gradient.CachedBlocks]:
    """A clone of a transformer whose attention takes K_bar, V_bar of the picture's tokens from `state`.

    The blocks before the first that learns run once a step, unless other nodes, or a ControlNet (controlled), look into
    them. Those behind keep their input alone for the gradient, and are run again on its way back.
    """
    patched, _ = gradient.prepare(model, layers[0], False)
    every, keys = host.thirds(model, family)["all"], frozenset(layer.key for layer in layers)
    first = every.index(layers[0].key)
    before, behind = (host.block_names(family, part) for part in (every[:first], every[first:]))
    prefix = gradient.CachedBlocks(before[-1] if before else "")
    if not controlled and not host.looks_into_blocks(model):
        prefix.install(patched, before)
    told = {"use_checkpoint": False} if family.own_checkpoint else {}
    checkpointing.install_on(patched, behind, told, family.writes_over)
    if family.rotates:
        rotation.install_on(patched, behind, family.rotates)
    host.replace_joint(patched, family, TUNING, lambda _: TunedJoint(keys, state), host.RECORDED)
    return patched, prefix
