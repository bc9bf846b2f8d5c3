"""Short runs of the three stages of KV Inversion on tiny models, as their tests need them."""

import harness
from harness import prompts
from palimpsest.nodes.inversion import ddim

__all__ = ["GUIDANCE", "STEPS", "apply", "prompts", "record", "sample", "start", "tune"]

STEPS, GUIDANCE = 4, 3.0


def record(model, latent, family="sd15"):
    """The trajectory of a latent."""
    levels = ddim.descending_schedule(model, "normal", STEPS, None)
    return ddim.invert(model, latent["samples"], *prompts(family), levels=levels)


def tune(model, trajectory, family="sd15", negative=None, **changes):
    """Run the node as the host would: (kv, reconstruction, report)."""
    return harness.tune(
        model, trajectory, prompts(family)[0], negative, **{"inner_steps": 4, "learning_rate": 0.05} | changes
    )


def start(model, trajectory):
    """The inverted noise as on a LATENT socket."""
    return model.model.process_latent_out(trajectory.latents[0].clone())


def apply(model, kv, mode="recompute", **settings):
    """Apply KV without source guidance unless it is asked for."""
    return harness.apply(model, kv, mode, **settings)


def sample(model, noise, guidance=GUIDANCE, family="sd15", negative=None, **settings):
    """The host's own sampler from inverted noise, with the prompts of the picture as it is."""
    positive, usual = prompts(family)
    return harness.sample(model, noise, positive, negative or usual, cfg=guidance, **{"steps": STEPS} | settings)
