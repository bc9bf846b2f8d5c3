"""The pocket model, which was trained as a diffusion model, seen as a flow-matching one: the same network, exactly.

A flow's x_t = (1 - t) x_0 + t eps is a diffusion model's x = x_0 + sigma eps times 1 - t, with sigma = t / (1 - t): the
network is asked at that x and sigma, and its x_0 is the flow's. Only beyond the noisiest sigma it was trained on (15 of
SD 1.5's, t = 0.94) nothing is known; there it is asked as at that one.
"""

from __future__ import annotations

from typing import Any


def as_flow(model: Any, shift: float = 1.0) -> Any:
    """A clone of a diffusion MODEL (eps) that samples as a flow."""
    import comfy.model_sampling
    import torch

    trained = model.get_model_object("model_sampling")
    highest = float(trained.sigma_max)

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        def diffusion(self, t: torch.Tensor) -> torch.Tensor:
            """sigma of t."""
            return (t / (1 - t).clamp(min=1e-6)).clamp(min=float(trained.sigma_min), max=highest)

        def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
            return trained.timestep(self.diffusion(sigma)) if torch.is_tensor(sigma) else super().timestep(sigma)

        def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            level = self.diffusion(sigma).view(-1, 1, 1, 1)
            return trained.calculate_input(level, noise * (1 + level))

        def calculate_denoised(self, sigma, model_output, model_input) -> torch.Tensor:
            level = self.diffusion(sigma).view(-1, 1, 1, 1)
            return trained.calculate_denoised(level, model_output, model_input * (1 + level))

    flow = model.clone()
    sampling = Flow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    flow.add_object_patch("model_sampling", sampling)
    return flow
