"""The source's own branch beside an edit: rows in every model call from which a method copies features.

MasaCtrl and plug-and-play sample the source next to the edit and copy keys, values, queries or features from it. The
branch runs with the prompt of the inversion at guidance 1, as published code does with an empty prompt for both (then
conditional and unconditional rows of the source are the same row). Two ways to walk:

    free    z_{t-1} = DDIM(z_t), from the inverted noise, with DDIM's drift ("DDIM + ..." in the literature)
    exact   z_{t-1} = DDIM(z_t) + (z*_{t-1} - DDIM(z*_t)), the offset of direct inversion (arXiv:2310.01506, Algorithm
            1): the branch stays on the recorded trajectory z*. Published code finds the offsets in a pass of its own;
            here they cost nothing, since z_t = z*_t in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from palimpsest.kernels.ddim import ddim_step
from torch import Tensor

KEY = "rivals.source_branch"


@dataclass(frozen=True)
class Moment:
    """What the layers of one model call are told: the last `pictures` rows are the source's, at `progress` in 0..1."""

    pictures: int
    progress: float


def moment(options: dict) -> Moment | None:
    """The Moment of this model call; None where no source rows run."""
    return options.get(KEY)


def copy_source(tensor: Tensor, pictures: int) -> Tensor:
    """Every chunk of rows becomes the source's: (chunks B + B, ...) -> the same shape, all chunks equal to the last."""
    return tensor[-pictures:].repeat(len(tensor) // pictures, *[1] * (tensor.ndim - 1))


class Branch:
    """Where the source stands in one sampling run: its latent at every step reached so far."""

    def __init__(self, noise: Tensor):
        self.latents = {0: noise}


@dataclass(frozen=True)
class StartBranch:
    """OUTER_SAMPLE wrapper: a fresh Branch for every sampling run, dropped when the run ends."""

    noise: Tensor

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        options[KEY + ".branch"] = Branch(self.noise)
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(KEY + ".branch", None)


@dataclass(frozen=True)
class SourceRows:
    """APPLY_MODEL wrapper: B rows of the source behind those of the edit, while progress < end; then none.

    latents (T+1, B, C, H, W) and sigmas as a trajectory has them, prompt (B or 1, L, D). Progress is step / T.
    """

    sigmas: tuple[float, ...]
    latents: Tensor
    prompt: Tensor
    exact: bool
    end: float

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
        transformer_options = {} if transformer_options is None else transformer_options
        step = self.step_at(float(t.flatten()[0]))
        now = Moment(self.latents.shape[1], step / (len(self.sigmas) - 1))
        if now.progress >= self.end:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        self.check(x, c_concat, c_crossattn, control, kwargs)
        branch: Branch = transformer_options[KEY + ".branch"]
        source = branch.latents[step].to(x)
        prompt = self.prompt.to(c_crossattn).expand(now.pictures, -1, -1)
        rows = executor(
            torch.cat([x, source]),
            torch.cat([t, t[:1].expand(now.pictures)]),
            None,
            torch.cat([c_crossattn, prompt]),
            None,
            {**transformer_options, KEY: now},
            **kwargs,
        )
        branch.latents[step + 1] = self.walk(step, source, rows[len(x) :])
        return rows[: len(x)]

    def step_at(self, sigma: float) -> int:
        """The step of a noise level. Raises ValueError off the trajectory's schedule, where no latent is known."""
        step = min(range(len(self.sigmas) - 1), key=lambda i: abs(self.sigmas[i] - sigma))
        if abs(self.sigmas[step] - sigma) > 1e-3 * sigma:
            raise ValueError(
                f"source branch: sigma {sigma:g} is no level of the trajectory: sample its steps by euler."
            )
        return step

    def check(self, x: Tensor, c_concat: Any, c_crossattn: Tensor, control: Any, others: dict) -> None:
        """Refuse what these rows are not built for."""
        if c_concat is not None or control is not None or others.get("y") is not None:
            raise ValueError("source branch: made for SD 1.x and 2.x without ControlNet or inpainting channels.")
        if len(x) % self.latents.shape[1] or c_crossattn.shape[1] != self.prompt.shape[1]:
            raise ValueError("source branch: edit and source need the same number of pictures and prompt tokens.")

    def walk(self, step: int, source: Tensor, denoised: Tensor) -> Tensor:
        """The source's next latent, free or with direct inversion's offset."""
        reached = ddim_step(source, denoised, *self.sigmas[step : step + 2])
        if not self.exact:
            return reached
        recorded = self.latents[step].to(source), self.latents[step + 1].to(source)
        offset = recorded[1] - ddim_step(recorded[0], denoised, *self.sigmas[step : step + 2])
        return reached + offset


def add(model: Any, trajectory: Any, prompt: list, exact: bool, end: float) -> Any:
    """A clone of the model that carries the source's rows. trajectory: Invert Picture's; prompt: its CONDITIONING."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, StartBranch(trajectory.latents[0]))
    rows = SourceRows(trajectory.sigmas, trajectory.latents, prompt[0][0], exact, end)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, rows)
    return patched


@dataclass(frozen=True)
class SharedAttention:
    """attn1 replacement: `share` mixes Q, K, V of edit and source while start <= progress < end.

    Outside of the window, and without source rows, it is the host's own attention.
    """

    share: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    start: float
    end: float

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        from palimpsest.nodes import host

        now = moment(options)
        if now is not None and self.start <= now.progress < self.end:
            query, key, value = self.share(query, key, value, now.pictures)
        return host.run_attention(options, None, query, key, value)
