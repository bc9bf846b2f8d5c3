"""Short runs of the three stages of KV Inversion on tiny models, as their tests need them."""

import comfy.samplers
import tiny_models
import torch
from palimpsest.nodes.inversion import ddim
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV

STEPS, GUIDANCE = 4, 3.0


def prompts(family="sd15", tokens=7):
    return tiny_models.prompt(1, family=family), tiny_models.prompt(2, tokens, family=family)


def record(model, latent, family="sd15"):
    """The trajectory of a latent."""
    levels = ddim.descending_schedule(model, "normal", STEPS, None)
    return ddim.invert(model, latent["samples"], *prompts(family), levels=levels)


def tune(model, trajectory, family="sd15", negative=None, **changes):
    """Run the node as the host would: (kv, reconstruction, report)."""
    positive, usual = prompts(family)
    inputs = {"model": model, "trajectory": trajectory, "positive": positive, "negative": negative or usual}
    settings = {"guidance": GUIDANCE, "inner_steps": 4, "learning_rate": 0.05, "tolerance": 0.0} | changes
    kv, rebuilt, report = tiny_models.execute(TuneKV, **inputs, **settings)
    return kv, rebuilt["samples"], report


def start(model, trajectory):
    """The inverted noise as on a LATENT socket."""
    return model.model.process_latent_out(trajectory.latents[0].clone())


def apply(model, kv, mode="recompute", **settings):
    """Apply KV without source guidance unless it is asked for."""
    settings = {"source_guidance": 1.0} | settings
    return tiny_models.execute(ApplyKV, model=model, kv=kv, mode=mode, **settings)[0]


def sample(
    model, noise, guidance=GUIDANCE, family="sd15", steps=STEPS, negative=None, sampler="euler", scheduler="normal"
):
    """The host's own sampler from inverted noise."""
    positive, usual = prompts(family)
    sampler = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, scheduler)
    return sampler.sample(
        torch.zeros_like(noise), positive, negative or usual, guidance, latent_image=noise, disable_pbar=True, seed=1
    )
