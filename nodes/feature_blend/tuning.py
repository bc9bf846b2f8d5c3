"""Learning one alpha a feature for one picture: the founding paper's "blending weights", without training a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import host, inputs
from ..host import gradient
from . import apply as feature_apply
from . import layers as layering
from .blend import BlendFeatures, sources_of
from .fitting import FitAlphas, LearnedAlphas, Prompts, Report, TuneSettings
from .layers import FeatureLayer
from .pairs import FitPairs, paired
from .weights import BlendWeights


def tune(
    model: Any,
    trajectory: host.Trajectory,
    prompts: Prompts,
    settings: TuneSettings,
    *,
    report: Report,
    mask: Tensor | None = None,
    edited: Tensor | None = None,
    recording: Any = None,
    callback: Any = None,
) -> BlendWeights:
    """Fit one alpha a feature: rebuild the source outside of the mask, keep the edit inside (maths.tuning_losses).

    Latents are the trajectory's own at every level (the edit's path would have to be sampled again after every step).
    edited (B, C, H, W) as on a LATENT socket: the trajectory's pictures as they should be, which predictions are then
    drawn to instead (FitPairs). Gradients go into the alphas only; the model is left as it was. recording and callback
    hear of the two passes. Raises ValueError for other architectures, unusable masks and pairs, NaN, and models spread
    over several GPUs.
    """
    chosen = learnable(layering.parse(settings.layers, layering.feature_layers(model, feature_apply.TECHNIQUE)))
    feature_apply.check(model, trajectory, mask)
    require_parts(mask)
    named = {"target_positive": prompts.edit, "negative": prompts.negative}
    inputs.require_active(model, trajectory.sigmas, settings.guidance, **named)
    mask = None if mask is None else host.as_encoded(mask, trajectory.latents.shape[-2:])
    if edited is not None:
        prompts, edited = paired(model, trajectory, prompts, edited, mask)
    model = host.single_device(model)
    with torch.inference_mode(False), host.refused_by_name(model, "Tune Feature Blend"):
        alphas = LearnedAlphas(chosen, model.load_device)
        blend = BlendFeatures(trajectory, alphas, sources_of(chosen, False), host.Window.of(model, 0.0, 1.0))
        with torch.no_grad():
            source, how = feature_apply.features_of(model, blend, prompts.source, host.AUTO, recording)
        fitting = FitAlphas(blend, settings, mask, report)
        if edited is not None:
            fitting = FitPairs(blend, settings, edited, report)
        fit(model, fitting, source, prompts, gradient_start(chosen[0], model), callback)
    learned = {str(layer): float(torch.sigmoid(alphas.raw[layer.key].detach())) for layer in chosen}
    info = {"losses": fitting.losses, "source": how, "towards": fitting.towards, **settings.named()}
    return BlendWeights(learned, trajectory.layout, info)


def require_parts(mask: Tensor | None) -> None:
    """Raise ValueError for a mask of one colour, which leaves one of the two losses without a place."""
    if mask is not None and not 0 < float(mask.mean()) < 1:
        raise ValueError(
            "the mask of Tune Feature Blend is one colour all over: white is the edit, black is what is rebuilt; paint "
            "both, or leave it off."
        )


def fit(
    model: Any, fitting: FitAlphas, source: host.Source, prompts: Prompts, first: tuple[str, int], callback: Any
) -> None:
    """Run a fitting on a clone of the model that blends; first: the first block that a gradient touches."""
    from comfy.patcher_extension import WrappersMP

    trajectory = fitting.blend.trajectory
    patched, positive, negative = with_copied_skips(model, prompts)
    host.attach_source(patched, fitting.blend, source)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, fitting.blend.name, host.pick_rows)
    patched, _ = gradient.prepare(patched, host.AttentionLayer(*first, 0, 0), False)
    host.sample(
        patched,
        fitting,
        model.model.process_latent_out(trajectory.latents[0].clone()),
        sigmas=torch.tensor(trajectory.sigmas),
        positive=positive,
        negative=negative,
        guidance=fitting.settings.guidance,
        callback=callback,
    )


def with_copied_skips(model: Any, prompts: Prompts) -> tuple[Any, list, list | None]:
    """(a clone, positive, negative) fit for a gradient where a ControlNet acts.

    The host adds it to the skips in place, after others have saved them for their gradient.
    """
    patched = model.clone()
    if not any("control" in extra for _, extra in (*prompts.edit, *(prompts.negative or ()))):
        return patched, prompts.edit, prompts.negative
    patched.set_model_input_block_patch_after_skip(lambda h, _: h.clone())
    return patched, *host.with_fixed_controls(prompts.edit, prompts.negative)


def learnable(layers: list[FeatureLayer]) -> list[FeatureLayer]:
    """Without "input 1", which edit and source share: no prompt has acted yet, and both are given the same latent.

    Raises ValueError where nothing is left.
    """
    found = [layer for layer in layers if layer.key != ("input", 1)]
    if not found:
        raise ValueError(
            "layers names 'input 1' only, which no prompt changes: there is nothing to learn; name others."
        )
    return found


def gradient_start(layer: FeatureLayer, model: Any) -> tuple[str, int]:
    """The block whose weights are the first that a gradient into this feature touches."""
    last = len(model.model.diffusion_model.output_blocks) - 1
    return ("output", last) if layer.key == layering.OUT else layer.key
