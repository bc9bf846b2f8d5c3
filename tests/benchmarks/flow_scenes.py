"""Scenes for the pocket transformer: a flow, inverted by Uni-Inv, sampled by the host's euler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from benchmarks import pocket_host
from benchmarks.scenes import Scenes
from comfy_extras import nodes_custom_sampler as custom
from pocket.flow_files import FILES

import nodes as host_nodes

SCHEDULER = "simple"


def load_flow() -> tuple[Any, Any, Any]:
    """(model, clip, vae) of the pocket transformer by the host's loaders."""
    import folder_paths

    models = Path(os.environ.get("PALIMPSEST_MODELS", pocket_host.ROOT / ".dev" / "models"))
    for kind in FILES:
        folder_paths.add_model_folder_path(kind, str(models / kind))
    (model,) = host_nodes.UNETLoader().load_unet(FILES["diffusion_models"], "default")
    (clip,) = host_nodes.CLIPLoader().load_clip(FILES["text_encoders"], "stable_diffusion")
    (vae,) = host_nodes.VAELoader().load_vae(FILES["vae"])
    return model, clip, vae


class FlowScenes(Scenes):
    """Scenes in the pocket transformer."""

    family = "flux"

    def load(self, narrow: bool) -> tuple[Any, Any, Any]:
        """As load_flow: a transformer has one width."""
        return load_flow()

    def inverted(self, latent: dict, prompt: list, **settings: Any) -> tuple[Any, dict, Any]:
        """As of a diffusion model, by Uni-Inv unless settings say otherwise."""
        return super().inverted(latent, prompt, **{"scheduler": SCHEDULER} | settings)

    def sampled(
        self, model: Any, positive: list, negative: list, guidance: float, latent: dict, found: Any = None,
        seed: int | None = None, sampler: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """A latent by the host's SamplerCustomAdvanced with euler, or another sampler; a seed draws the noise."""
        noise = found if seed is None else custom.RandomNoise.execute(seed).args[0]
        guider = custom.CFGGuider.execute(model, positive, negative, guidance).args[0]
        sampler = sampler or custom.KSamplerSelect.execute("euler").args[0]
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, self.sigmas(), latent).args[0]["samples"]

    def sigmas(self) -> torch.Tensor:
        """The noise levels of inversion and sampling."""
        return custom.BasicScheduler.execute(self.model, SCHEDULER, self.steps, 1.0).args[0]
