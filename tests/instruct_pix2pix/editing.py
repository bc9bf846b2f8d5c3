"""A small InstructPix2Pix model, the picture it changes, and the host's two guidances."""

from __future__ import annotations

import comfy.samplers
import tiny_models
import torch
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from harness import invert
from palimpsest.nodes.words import ChosenWords

NEGATIVE, MIDDLE, POSITIVE = 0, 1, 2  # the host's numbers of its three prompts
WORDS = (2, 3)
TEXT_GUIDANCE, PICTURE_GUIDANCE = 7.5, 1.5
MODELS = [("sd15_edit", "EPS"), ("sdxl_edit", "EPS"), ("sdxl_edit", "V_PREDICTION_EDM")]


class Editing:
    """An instruction as text and picture, the picture alone, and nothing, with the picture inverted by the second."""

    def __init__(self, family="sd15_edit", prediction="EPS", pictures=1):
        self.model = tiny_models.unet(family, prediction)
        self.vae, self.pixels = tiny_models.AveragingVAE(), tiny_models.picture(pictures)
        self.text, self.nothing = (tiny_models.prompt(seed, family=family) for seed in (1, 2))
        self.both, self.picture, _ = tiny_models.execute(
            InstructPixToPixConditioning, positive=self.text, negative=self.nothing, vae=self.vae, pixels=self.pixels
        )
        self.latent = {"samples": self.vae.encode(self.pixels)}
        self.trajectory, self.noise, *_ = invert(self.model, self.latent, self.picture, self.picture, steps=3)
        self.words = ChosenWords(("word",), (WORDS,), self.text[0][0])

    def sample(self, model=None, style="regular", added=None):
        """The edit, from inverted noise, or from other noise on an empty latent."""
        guider = tiny_models.execute(
            DualCFGGuider, model=model or self.model, cond1=self.both, cond2=self.picture, negative=self.nothing,
            cfg_conds=TEXT_GUIDANCE, cfg_cond2_negative=PICTURE_GUIDANCE, style=style,
        )[0]  # fmt: skip
        start = (torch.zeros_like(self.noise), self.noise) if added is None else (added, torch.zeros_like(self.noise))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(self.trajectory.sigmas)
        return guider.sample(*start, sampler, sigmas, disable_pbar=True, seed=1)


def seen_by(model, run):
    """What the network was given in each call of a run: (numbers of the prompts, x, picture), a chunk of rows each."""
    from comfy.patcher_extension import WrappersMP

    found, watched = [], model.clone()

    def look(executor, x, t, c_concat=None, *rest, **more):
        options = more.get("transformer_options") or rest[2]
        groups = options["cond_or_uncond"]
        found.append((list(groups), x.chunk(len(groups)), c_concat.chunk(len(groups))))
        return executor(x, t, c_concat, *rest, **more)

    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", look)
    return run(watched), found
