"""Null-text inversion (arXiv:2211.09794, Algorithm 1): an unconditional embedding per step that rebuilds the source.

    min over phi_t of || z*_{t-1} - z_{t-1}(z_t, phi_t, C) ||^2        eq. 3, under guidance, in the paper's z

As published code has it: Adam anew in every step with rate 1e-2 (1 - i / 100), i = 0 at the noisiest of 50 steps; at
most 10 iterations; a step stops once its mean squared error is below 1e-5 + 2e-5 i; phi_t starts from the step before;
the conditional row runs once a step. Here i is scaled to 50 steps. A batch stops a step when its last picture may.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from palimpsest.kernels.ddim import ddim_step, signal_level
from palimpsest.nodes.host import sampling as host_sampling
from torch import Tensor

KEY = "rivals.null_text"
RATE = 1e-2
ITERATIONS = 10
TOLERANCE = 1e-5
PUBLISHED_STEPS = 50


@dataclass(frozen=True)
class Unconditional:
    """APPLY_MODEL wrapper: the unconditional rows read the text embedding (B, L, D) that belongs to their sigma."""

    embedding_at: Callable[[float], Tensor]

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        order = (transformer_options or {}).get("cond_or_uncond", ())
        if 1 in order:
            chunks = list(c_crossattn.chunk(len(order)))
            chunks[order.index(1)] = self.embedding_at(float(t.flatten()[0])).to(c_crossattn)
            c_crossattn = torch.cat(chunks)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class FitUnconditional:
    """A host sampler function that fits phi_t along a trajectory and keeps them in `embeddings`, (B, L, D) a step."""

    def __init__(self, trajectory: Any, guidance: float, start: Tensor, iterations: int, rate: float):
        self.trajectory, self.guidance, self.iterations, self.rate = trajectory, guidance, iterations, rate
        self.current = start.detach().float().clone().expand(trajectory.pictures, -1, -1)
        self.embeddings: list[Tensor] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_: Any
    ) -> Tensor:
        """x (B, C, H, W), the trajectory's noisiest latent. Returns the reconstruction."""
        self.current = self.current.to(x.device)
        for i, levels in enumerate(itertools.pairwise(sigmas.tolist())):
            x = self.fit(model.inner_model, extra_args["model_options"], x, i, *levels)
            self.embeddings.append(self.current.detach().cpu())
        return x

    def fit(self, guider: Any, options: dict, x: Tensor, step: int, sigma: float, sigma_next: float) -> Tensor:
        """Minimise eq. 3 over this step's embedding; returns z_{t-1} with what was found."""
        from comfy.samplers import calc_cond_batch

        level, goal = x.new_full((len(x),), sigma), self.trajectory.latents[step + 1].to(x)
        published_step = step * PUBLISHED_STEPS / self.trajectory.steps

        def predict(positive: Any = None, negative: Any = None) -> tuple[Tensor, Tensor]:
            return calc_cond_batch(guider.inner_model, [positive, negative], x, level, options)

        def advance() -> Tensor:
            uncond = predict(negative=guider.conds["negative"])[1]
            return ddim_step(x, uncond + self.guidance * (cond - uncond), sigma, sigma_next)

        with torch.no_grad():
            cond = predict(positive=guider.conds["positive"])[0]
        self.current = self.current.detach().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([self.current], lr=self.rate * (1 - published_step / (2 * PUBLISHED_STEPS)))
        for _ in range(self.iterations):
            with torch.enable_grad():
                losses = (advance() - goal).square().mean((1, 2, 3)) * signal_level(sigma_next) ** 2
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
            if float(losses.detach().max()) < TOLERANCE * (1 + 2 * published_step):
                break
        with torch.no_grad():
            return advance()


def differentiable(model: Any) -> Any:
    """A clone of the model that lets gradients reach the text: the host loads weights autograd may not save."""
    from comfy.ldm.modules.attention import attention_pytorch

    patched = model.clone()
    for name, module in model.model.diffusion_model.named_modules():
        if hasattr(module, "weight_function"):
            for parameter, _ in module.named_parameters(recurse=False):
                patched.add_weight_wrapper(f"diffusion_model.{name}.{parameter}", savable)
    options = patched.model_options["transformer_options"] = patched.model_options["transformer_options"].copy()
    options["optimized_attention_override"] = lambda function, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return patched


def savable(weight: Tensor) -> Tensor:
    """The weight, as a tensor that autograd may save and does not train."""
    return (weight.clone() if weight.is_inference() else weight).detach()


def tune(
    model: Any,
    trajectory: Any,
    positive: list,
    negative: list,
    guidance: float,
    iterations: int = ITERATIONS,
    rate: float = RATE,
) -> tuple[Tensor, Tensor]:
    """(phi (T, B, L, D) on the CPU, reconstruction as on a LATENT socket). The model is left as it was."""
    from comfy.patcher_extension import WrappersMP

    with torch.inference_mode(False):
        fitting = FitUnconditional(trajectory, guidance, negative[0][0].clone(), iterations, rate)
        patched = differentiable(model)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, Unconditional(lambda _: fitting.current))
        start, levels = model.model.process_latent_out(trajectory.latents[0].clone()), torch.tensor(trajectory.sigmas)
        prompts = {"positive": positive, "negative": negative, "guidance": guidance}
        rebuilt = host_sampling.sample(patched, fitting, start, sigmas=levels, **prompts)
    return torch.stack(fitting.embeddings), rebuilt.cpu()


def apply(model: Any, trajectory: Any, embeddings: Tensor) -> Any:
    """A clone of the model whose unconditional rows read phi of the nearest step."""
    from comfy.patcher_extension import WrappersMP

    levels = torch.tensor(trajectory.sigmas[:-1])
    patched = model.clone()
    nearest = Unconditional(lambda sigma: embeddings[int((levels - sigma).abs().argmin())])
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, nearest)
    return patched
