"""What the tests of Feature Blend share: a small model, its inverted picture, and how an edit of it is sampled."""

import comfy.samplers
import harness
import tiny_models
import torch
from palimpsest.nodes.feature_blend import layers as layering
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.inversion.nodes import Invert

import nodes

STEPS, GUIDANCE = 3, 3.0
EVERYTHING = "input, middle, output, out"
edits = harness.edits


def original(family="sd15"):
    """The prompt that describes the source."""
    return tiny_models.prompt(1, family=family)


def invert(model, latent, prompt, steps=STEPS):
    """(trajectory, inverted noise)."""
    found = tiny_models.execute(
        Invert, model=model, latent=latent, positive=prompt, steps=steps, reconstruction_guidance=0.0
    )
    return found[0], found[1]["samples"]


def blend(model, trajectory, prompt=None, **settings):
    """The model behind Feature Blend, which by default here holds no latents."""
    settings = {"blend_latents_until": 0.0, "positive": prompt or original()} | settings
    return tiny_models.execute(FeatureBlend, model=model, trajectory=trajectory, **settings)[0]


def sample(model, noise, positive=None, negative=None, *, random=False, **settings):
    """The host's own sampler, from inverted noise or from random noise over it."""
    added = torch.randn(noise.shape, generator=torch.Generator().manual_seed(9)) if random else None
    return harness.sample(model, noise, positive, negative, noise=added, **{"steps": STEPS} | settings)


def half(side=64, value=1.0):
    """A mask that is white on the left."""
    return value * harness.half(side, side)


def differs(picture, other):
    """Whether a finite picture differs from another by more than rounding."""
    assert torch.isfinite(picture).all()
    return harness.acts(picture, other)


def acting(patched):
    """The wrapper of a patched model that lets it act by a source."""
    (found,) = [w for named in patched.wrappers["predict_noise"].values() for w in named if hasattr(w, "source")]
    return found


def source_of(patched):
    """Where its features of the source come from."""
    return acting(patched).source


def cached(model, trajectory, prompt=None, layers=EVERYTHING):
    """The features that Feature Blend records."""
    patched = blend(model, trajectory, prompt, layers=layers, source_features="cached", alpha_inside=0.5)
    return source_of(patched)


def calls(model, x, sigma, positive, negative=None, guidance=1.0):
    """The host's denoised picture of x at a level, with patches, guidance and all."""
    found = []

    def once(run, start, sigmas, extra_args, callback, disable=False, **_):
        found.append(run(x.to(start), start.new_full((len(start),), sigma), **extra_args))
        return start

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or positive)
    guider.set_cfg(guidance)
    sampler = comfy.samplers.KSAMPLER(once)
    guider.sample(torch.zeros_like(x), x, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
    return found[0]


class SeenInputs:
    """What every block of a network is given while it is looked at."""

    def __init__(self, model):
        network, self.seen, self.handles = model.model.diffusion_model, [], []
        for place, number, block in layering.host.blocks(network):
            self.watch((place, number), block)
        self.watch(layering.OUT, network.out[0])

    def watch(self, name, module):
        def note(_, args):
            self.seen.append((name, args[0].clone()))

        first = module[0] if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) else module
        self.handles.append(first.register_forward_pre_hook(note))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def passes(self):
        """One dictionary for every pass of the network."""
        found = []
        for name, h in self.seen:
            if name == ("input", 0):
                found.append({})
            found[-1][name] = h
        return found


def with_controlnet(positive, negative):
    inputs = {"control_net": tiny_models.controlnet(), "image": tiny_models.picture(seed=4), "strength": 0.5}
    return tiny_models.execute(
        nodes.ControlNetApplyAdvanced,
        positive=positive,
        negative=negative,
        start_percent=0.0,
        end_percent=1.0,
        **inputs,
    )


def in_area(prompt, x, y, width, height):
    inputs = {"conditioning": prompt, "x": x, "y": y, "width": width, "height": height, "strength": 1.0}
    return tiny_models.execute(nodes.ConditioningSetArea, **inputs)[0]


def walked(model, noise, **settings):
    """Latents after every step of Euler sampling, in the model's scale."""
    found = []
    sample(model, noise, callback=lambda step, denoised, x, total: found.append(x.clone()), **settings)
    end = model.model.process_latent_in(sample(model, noise, **settings))
    return [*found, end]


LATENTS = {"alpha_outside": 1.0, "mask": half(), "blend_latents_until": 1.0}


BLACK = (..., slice(4, 8))
