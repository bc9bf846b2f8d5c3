"""What tests of nodes do again and again on the tiny models: invert, tune, apply, sample, compare.

Nodes run as the host runs them, by name, at their defaults except what is given (tiny_models.execute). Every function
takes the same small picture and prompts unless it is told others. `inference` in conftest.py is the fixture for a file
whose tests need no gradients: `pytestmark = pytest.mark.usefixtures("inference")`.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
import tiny_models
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from torch import Tensor

STEPS, GUIDANCE = 5, 3.0
CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------------- what is worked on


def prompts(family: str = "sd15", tokens: int = 7) -> tuple[list, list]:
    """(positive, negative) of the picture as it is; `tokens` of the negative."""
    return tiny_models.prompt(1, family=family), tiny_models.prompt(2, tokens, family=family)


def edits(family: str = "sd15", tokens: int = 7) -> tuple[list, list]:
    """(positive, negative) of the picture as it should be; the negative is that of `prompts`."""
    return tiny_models.prompt(3, family=family), tiny_models.prompt(2, tokens, family=family)


def noise(height: int = 8, width: int = 8, pictures: int = 1, seed: int = 3) -> Tensor:
    """Noise of a latent's shape (B, 4, H, W)."""
    return torch.randn(pictures, 4, height, width, generator=torch.Generator().manual_seed(seed))


def half(height: int = 64, width: int = 64, soft: float | None = None) -> Tensor:
    """A MASK that is white on the left; `soft`: the value of a border of 8 pixels behind it."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    if soft is not None:
        mask[..., width // 2 : width // 2 + 8] = soft
    return mask


def family_of(model: Any) -> str:
    return "sdxl" if model.model.diffusion_model.num_classes else "sd15"


# -------------------------------------------------------------------------------------------------------------- nodes


def invert(
    model: Any, latent: dict | None = None, positive: list | None = None, negative: list | None = None, **settings: Any
) -> tuple:
    """Invert Picture, STEPS steps: (trajectory, noise as a tensor, rebuilt latent as a tensor, report)."""
    latent = tiny_models.latent() if latent is None else latent
    usual = prompts(family_of(model))
    inputs = {"positive": positive or usual[0], "negative": negative or usual[1], "steps": STEPS} | settings
    trajectory, start, rebuilt, report, _ = tiny_models.execute(Invert, model=model, latent=latent, **inputs)
    return trajectory, start["samples"], rebuilt["samples"], report


def tune(
    model: Any, trajectory: Any, positive: list | None = None, negative: list | None = None, **settings: Any
) -> tuple:
    """Tune KV, briefly: (kv, rebuilt latent as a tensor, report)."""
    usual = prompts(family_of(model))
    brief = {"guidance": GUIDANCE, "inner_steps": 3, "tolerance": 0.0} | settings
    inputs = {"trajectory": trajectory, "positive": positive or usual[0], "negative": negative or usual[1]}
    kv, rebuilt, *rest = tiny_models.execute(TuneKV, model=model, **inputs, **brief)
    return kv, rebuilt["samples"], *rest


def apply(model: Any, kv: Any, mode: str = "extend", **settings: Any) -> Any:
    """Apply KV, without source guidance unless it is asked for: the patched model."""
    return tiny_models.execute(ApplyKV, model=model, kv=kv, mode=mode, **{"source_guidance": 1.0} | settings)[0]


def guided(model: Any) -> Any:
    """The model behind a node of the host's with a guidance of its own."""
    return tiny_models.execute(PerturbedAttentionGuidance, model=model)[0]


# ------------------------------------------------------------------------------------------------------------ sampling


def sample(
    model: Any,
    latent: Tensor,
    positive: list | None = None,
    negative: list | None = None,
    *,
    noise: Tensor | None = None,
    steps: int = STEPS,
    cfg: float = GUIDANCE,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 1,
    **others: Any,
) -> Tensor:
    """The host's own sampler from a latent, with the prompts of an edit unless others are given.

    No noise is added, as where the latent is noise that was found, unless `noise` is given.
    """
    usual = edits(family_of(model))
    sampling = comfy.samplers.KSampler(model, steps, CPU, sampler, scheduler)
    added = torch.zeros_like(latent) if noise is None else noise
    given = {"cfg": cfg, "latent_image": latent, "disable_pbar": True, "seed": seed} | others
    return sampling.sample(added, positive or usual[0], negative or usual[1], **given)


def sample_noise(
    model: Any, added: Tensor | None = None, positive: list | None = None, negative: list | None = None, **settings: Any
) -> Tensor:
    """The host's own sampler from noise on an empty latent, as KSampler draws a new picture."""
    added = noise() if added is None else added
    return sample(model, torch.zeros_like(added), positive, negative, noise=added, **settings)


# ---------------------------------------------------------------------------------------------------------- comparing


def acts(picture: Tensor, without: Tensor, share: float = 1e-5) -> bool:
    """Whether a result is finite and differs from another by more than rounding does (ten times, at 1e-5)."""
    return bool(torch.isfinite(picture).all()) and float((picture - without).norm()) > share * float(without.norm())


def assert_acts(picture: Tensor, without: Tensor, share: float = 1e-5) -> None:
    assert torch.isfinite(picture).all()
    assert (picture - without).norm() > share * without.norm()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
