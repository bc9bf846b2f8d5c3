"""InstructPix2Pix (arXiv:2211.09800): the trained 8-channel form of the pocket's U-Net, told what to do.

The picture stands beside the latent, so that nothing is inverted; sampling starts from new noise under two guidances,
one of the text and one of the picture, by the host's own InstructPixToPixConditioning and Dual CFG Guider.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.scenes import Scenes
from comfy.patcher_extension import WrappersMP
from instruction_training.pocket_triples import NOUNS
from pocket import world

INSTRUCTIONS = {
    "pose": "let it be {}", "colour": "paint it {}", "place": "put it into {}", "species": "turn it into a {}",
}  # fmt: skip


def instruction(source: world.Scene, edited: world.Scene) -> str:
    """What is asked for, in a phrase that the training held; nothing where nothing changes."""
    for kind, phrase in INSTRUCTIONS.items():
        value = getattr(edited, kind)
        if value != getattr(source, kind):
            return phrase.format(NOUNS.get(value, value))
    return ""


@cache
def load(scenes: Scenes) -> Any:
    """The trained model in its own width, with the wrappers of the scenes' model, which count; once."""
    from instruction.benchmark import edit_model

    with tempfile.TemporaryDirectory() as folder:
        model, *_ = edit_model(Path(folder))
    for name, wrappers in scenes.model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).items():
        for wrapper in wrappers:
            model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, name, wrapper)
    return model


def sample(scenes: Scenes, model: Any, targets: list[world.Scene], text: float, picture: float) -> torch.Tensor:
    """A latent of every scene edited into its target by the instruction that says so; noise by the scene's place."""
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualCFGGuider
    from comfy_extras.nodes_ip2p import InstructPixToPixConditioning

    told = scenes.encode_texts([instruction(*pair) for pair in zip(scenes.sources, targets, strict=True)])
    seen = InstructPixToPixConditioning.execute(told, scenes.nothing, scenes.pictures, scenes.vae)
    first, second, latent = getattr(seen, "args", seen)
    guider = DualCFGGuider.execute(model, first, second, scenes.nothing, text, picture, "regular")
    (guider,) = getattr(guider, "args", guider)
    empty = latent["samples"]
    noise = torch.cat([comfy.sample.prepare_noise(empty[i : i + 1], i) for i in range(len(empty))])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", scenes.steps)
    solver = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, empty, solver, sigmas, disable_pbar=True, seed=0)
