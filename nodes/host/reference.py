"""A source beside its edit: what the network makes of the source, recorded before sampling or beside every step.

The source has a pass of its own through the same network, at the edit's noise level and with its own prompt. Rows of
it appended to the edit's batch would save nothing, and break ControlNets (whose output fits the edit's rows only) and
every patch that counts rows by cond_or_uncond; a pass of its own disturbs neither.

A technique says what it wants to know (`Wanted`). Its patches find a step under its name among the options: in a pass
of the source the recorder, in a pass of the edit what is done with the recorded pieces, else nothing.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .call import Run, noise_level, observe, run_of
from .cancelling import stop_if_cancelled
from .finite import is_finite
from .flow import as_sampled, in_dimensions_of
from .frames import in_one_window
from .pictures import in_words, needs_pictures, shows_picture
from .prompts import require_active
from .sampling import as_source_pass, sample
from .step_caches import every_step_runs, take_caches_out
from .streaming import PieceStream
from .trajectory import Trajectory, latents_at, nearest_level

PREFIX = "palimpsest.source."  # of the names of all techniques that look at a source: none acts in a pass of one
LEFT_OUT = ("control", "hooks", "gligen", "additional_models")  # of the source's prompt: they belong to the edit

AUTO, CACHED, SAME_STEP = "auto", "cached", "same step"
SOURCE_FEATURES = (AUTO, CACHED, SAME_STEP)
SHARE = 0.25  # of the free memory that recorded pieces may take where this is left to the node

Pieces = Mapping[Hashable, Tensor]  # what is kept of a source at one noise level, (B or 1, ...) each


# ---- what a technique says ------------------------------------------------------------------------------------------


class Recorder(Protocol):
    """What the patches meet in a pass of the source."""

    def pieces(self) -> Pieces:
        """All that was kept. Raises ValueError if the source never ran."""


class Wanted(Protocol):
    """What a technique wants to know of a source, at which noise levels, and what it does with it.

    name: from `source_name`, a node's own. trajectory: the source's latents.
    """

    name: str
    trajectory: Trajectory

    def kinds(self, sigma: float) -> frozenset[Hashable]:
        """What is wanted at a noise level; empty where nothing is."""

    def follows(self, x: Tensor, sigma: float, run: Run) -> bool:
        """Whether it is wanted for the latent x (B, C, H, W) that is sampled; asked once a model call."""

    def numbers(self, model: Any, sigma: float) -> int:
        """How many numbers of a picture that is, before anything runs."""

    def patch(self, patched: Any) -> None:
        """Put the patches on a clone."""

    def recorder(self, sigma: float) -> Recorder:
        """What the patches meet in a pass of the source."""

    def acting(self, sigma: float, pieces: Pieces, run: Run) -> Any:
        """What they meet in a pass of the edit."""


def source_name(technique: str) -> str:
    """A name of its own for one node's patches and wrappers."""
    return f"{PREFIX}{technique}.{uuid.uuid4().hex}"


def source_prompt(prompt: list) -> list:
    """The source's prompt without what belongs to the edit. Raises ValueError where it is limited to an area."""
    if any("area" in extra or extra.get("set_area_to_bounds") for _, extra in prompt):
        raise ValueError(
            "the source prompt describes the whole picture, this one is limited to an area: connect it without "
            "ConditioningSetArea, and masks with set_cond_area default."
        )
    return [[tensor, {key: value for key, value in extra.items() if key not in LEFT_OUT}] for tensor, extra in prompt]


def source_levels(wanted: Wanted) -> tuple[float, ...]:
    """The trajectory's levels at which something is wanted."""
    return tuple(sigma for sigma in wanted.trajectory.sigmas if sigma > 0 and wanted.kinds(sigma))


# ---- one sampling run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One model call of a sampler, as a PREDICT_NOISE wrapper is given it."""

    guider: Any
    x: Tensor
    timestep: Tensor
    sigma: float
    model_options: dict

    def options_with(self, name: str, step: Any, alone: bool = False) -> dict:
        """The call's model_options with a step for a technique's patches; alone: and with no other technique's."""
        options = self.model_options["transformer_options"]
        if alone:
            options = {key: value for key, value in options.items() if not str(key).startswith(PREFIX)}
        return self.model_options | {"transformer_options": options | {name: step}}


class Held:
    """What a run holds of a source: its prompt as the model takes it, the pieces in use, what streams them."""

    def __init__(self) -> None:
        self.prompt: list[dict] = []
        self.at: Any = None
        self.pieces: Pieces = {}
        self.stream = PieceStream()

    def use(self, at: Any, make: Callable[[], Pieces]) -> Pieces:
        """The pieces of a level, made once while the level stays the same."""
        if self.at != at:
            self.pieces, self.at = make(), at
        return self.pieces


def held_of(run: Run, wanted: Wanted) -> Held:
    """What a run holds for one node."""
    return run.kept((wanted.name, "source"), Held)


class Source(Protocol):
    """Where a step's pieces come from."""

    def begin(self, held: Held, guider: Any, noise: Tensor, **others: Any) -> None:
        """Prepare for a sampling run; others as the host's process_conds takes them."""

    def at(self, wanted: Wanted, held: Held, step: Step) -> Pieces:
        """The pieces at a call's noise level, on its device."""


@dataclass(frozen=True)
class BeginSource:
    """SAMPLER_SAMPLE wrapper: check the picture's size and prepare the source."""

    wanted: Wanted
    source: Source

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider, _, extra_args, _, noise, latent, denoise_mask, *_ = args
        self.wanted.trajectory.check_batch(noise)
        latent = torch.zeros_like(noise) if latent is None else latent
        others = {"latent_image": latent, "denoise_mask": denoise_mask, "seed": extra_args.get("seed")}
        self.source.begin(held_of(run_of(extra_args["model_options"]), self.wanted), guider, noise, **others)
        return executor(*args, **kwargs)


@dataclass(frozen=True)
class ActOnSource:
    """PREDICT_NOISE wrapper: once per model call, fetch the source's pieces for the technique's patches."""

    wanted: Wanted
    source: Source

    def __call__(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None, **kwargs
    ) -> Tensor:
        sigma, model_options = noise_level(timestep, model_options)
        run = run_of(model_options)
        if self.wanted.kinds(sigma) and self.wanted.follows(x, sigma, run):
            step = Step(executor.class_obj, x, timestep, sigma, model_options)
            pieces = self.source.at(self.wanted, held_of(run, self.wanted), step)
            model_options = step.options_with(self.wanted.name, self.wanted.acting(sigma, pieces, run))
        return executor(x, timestep, model_options, seed, **kwargs)


def attach_source(patched: Any, wanted: Wanted, source: Source) -> None:
    """Let a technique act on a clone by a source."""
    from comfy.patcher_extension import WrappersMP

    observe(patched)
    wanted.patch(patched)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, wanted.name, BeginSource(wanted, source))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, wanted.name, ActOnSource(wanted, source))


# ---- a pass beside every step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SameStep:
    """A pass of the source before every step of the edit: one more row, and one step's pieces."""

    prompt: list

    def begin(self, held: Held, guider: Any, noise: Tensor, **others: Any) -> None:
        """Encode the source's prompt for the model; an inpaint or instruct model sees the edit's own pictures."""
        import comfy.sampler_helpers
        import comfy.samplers

        edits = next(iter(guider.conds.values()), [])
        edited = guider.conds.get("positive") or edits
        pictures = {key: value for key, value in (edited[0] if edited else {}).items() if key.startswith("concat_")}
        prompt = comfy.sampler_helpers.convert_cond(source_prompt(self.prompt))
        conds = {"positive": [pictures | cond for cond in prompt]}
        comfy.samplers.process_conds(guider.inner_model, noise, conds, noise.device, **others)
        held.prompt = conds["positive"]

    def at(self, wanted: Wanted, held: Held, step: Step) -> Pieces:
        """Run the source; a sampler that asks twice at one level has it once."""
        return held.use(step.sigma, partial(self.passed, wanted, held, step))

    def passed(self, wanted: Wanted, held: Held, step: Step) -> Pieces:
        """What one pass on the trajectory's latents leaves. Other nodes' blending, fusing and caching stay out."""
        import comfy.samplers

        recorder = wanted.recorder(step.sigma)
        x = in_dimensions_of(latents_at(wanted.trajectory, step.sigma), step.x).to(step.x)
        options = as_source_pass(step.options_with(wanted.name, recorder, alone=True))
        options = every_step_runs(in_one_window(options))
        with torch.no_grad():
            level = step.timestep[:1].expand(len(x))
            comfy.samplers.calc_cond_batch(step.guider.inner_model, [held.prompt], x, level, options)
        return recorder.pieces()


# ---- recorded over a trajectory -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Level:
    """All pieces of one noise level in one tensor (B, P) on the CPU, in the order of their shapes, which lack B."""

    sigma: float
    piece: Tensor
    shapes: Mapping[Hashable, tuple[int, ...]]

    @classmethod
    def of(cls, sigma: float, pieces: Pieces) -> Level:
        """Pieces put together, in the type of the first. Raises ValueError where they hold no numbers."""
        first = next(iter(pieces.values()))
        shapes = {name: tuple(piece.shape[1:]) for name, piece in pieces.items()}
        together = torch.cat([piece.to(first).flatten(1) for piece in pieces.values()], 1).cpu()
        if not is_finite(together):
            raise ValueError(
                f"the model returns NaN for the source at noise level {sigma:.4g}: run it in another precision (start "
                "ComfyUI with --bf16-unet or --fp32-unet), or look at the source's prompt."
            )
        return cls(sigma, together, shapes)

    def views(self, piece: Tensor) -> Pieces:
        """The pieces again, as views of their tensor on some device."""
        parts = piece.split([math.prod(shape) for shape in self.shapes.values()], 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass(frozen=True, eq=False)
class Cached:
    """Recorded levels, the noisiest first, in ordinary memory; two at a time go to the device."""

    levels: tuple[Level, ...]

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(level.piece.nbytes for level in self.levels)

    def begin(self, held: Held, guider: Any, noise: Tensor, **others: Any) -> None:
        """Nothing to prepare."""

    def at(self, wanted: Wanted, held: Held, step: Step) -> Pieces:
        """The pieces recorded nearest to the level; those of the next begin their way to the device.

        The nearest of all may have been recorded without what is wanted at this level.
        """
        kinds = wanted.kinds(step.sigma)
        fit = [index for index, level in enumerate(self.levels) if kinds <= wanted.kinds(level.sigma)]
        index = fit[nearest_level(tuple(self.levels[i].sigma for i in fit), step.sigma)]
        return held.use(index, partial(self.fetch, index, held.stream, step.x.device))

    def fetch(self, index: int, stream: PieceStream, device: torch.device) -> Pieces:
        """The pieces of a level on a device."""
        here, *coming = ({number: level.piece} for number, level in list(enumerate(self.levels))[index : index + 2])
        return self.levels[index].views(stream.fetch(here, coming[0] if coming else {}, device)[index])


class RecordLevels:
    """A host sampler function: run the source at each of its levels and keep what was recorded."""

    def __init__(self, wanted: Wanted):
        self.wanted = wanted
        self.levels: list[Level] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x (B, C, H, W) gives device and dtype and is returned unchanged: the result is in `levels`."""

        options = extra_args["model_options"]
        for i, sigma in enumerate(source_levels(self.wanted)):
            stop_if_cancelled()
            recorder = self.wanted.recorder(sigma)
            found = options | {"transformer_options": options["transformer_options"] | {self.wanted.name: recorder}}
            here = in_dimensions_of(latents_at(self.wanted.trajectory, sigma), x).to(x)
            given = extra_args | {"model_options": as_source_pass(found)}
            denoised = model(here, here.new_full((len(here),), sigma), **given)
            self.levels.append(Level.of(sigma, recorder.pieces()))
            if callback is not None:
                callback({"i": i, "x": here, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return x


def record(model: Any, wanted: Wanted, prompt: list, callback: Any = None) -> Cached:
    """Run the source through the model at every level at which something is wanted; the model is left as it was.

    callback(step, denoised, x, steps) as the host's samplers call it. Takes one row of the network a level and picture.
    """
    function, patched = RecordLevels(wanted), without_techniques(model)
    wanted.patch(patched)
    start = model.model.process_latent_out(as_sampled(model, wanted.trajectory.latents[0].clone()))
    levels = torch.tensor([*source_levels(wanted), 0.0])
    sample(patched, function, start, sigmas=levels, positive=source_prompt(prompt), callback=callback)
    return Cached(tuple(function.levels))


def without_techniques(model: Any) -> Any:
    """A clone on which no technique acts by a source: their patches find no step among the options, nor do caches."""
    plain = model.clone()
    take_caches_out(plain)
    for kind, named in list(plain.wrappers.items()):
        for name in [name for name in named if str(name).startswith(PREFIX)]:
            plain.remove_wrappers_with_key(kind, name)
    return plain


# ---- which of the two -----------------------------------------------------------------------------------------------


def chosen_source(
    model: Any, wanted: Wanted, prompt: list, chosen: str, *, pictures: str, smaller: str, callback: Any = None
) -> tuple[Source, str]:
    """(where the pieces come from, a sentence): recorded if asked for, or if a quarter of the free memory holds them.

    pictures, smaller: what else helps against missing pictures and missing memory. callback hears of the recording.
    Raises ValueError where it was asked for and needs pictures that only the edit's prompt has, or does not fit.
    """
    require_active(model, prompt, source_levels(wanted), "the source's prompt")
    levels, needed, free = len(source_levels(wanted)), expected_bytes(model, wanted), free_memory()
    unseen = needs_pictures(model) and not shows_picture(prompt)
    if chosen == CACHED and unseen:
        raise ValueError(
            f"source_features 'cached' of {in_words(model)} need its pictures on the source prompt, too: set "
            f"source_features to 'same step'{pictures}."
        )
    if chosen == CACHED and needed > free:
        raise ValueError(
            f"source_features 'cached' need {needed / 1e9:.1f} GB ({levels} levels), {free / 1e9:.1f} GB of memory are "
            f"free: set source_features to 'same step'{smaller}."
        )
    if chosen == CACHED or (chosen == AUTO and not unseen and needed <= SHARE * free):
        cached = record(model, wanted, prompt, callback)
        size = f"{levels} levels, {cached.bytes / 1e6:.1f} MB of ordinary memory"
        return cached, f"source cached ({size}), no further cost a step"
    reason = f"; cached it would take {needed / 1e6:.1f} MB" if not unseen else ""
    return SameStep(prompt), f"source run at the same step: one more row of the network in {levels} steps{reason}"


def expected_bytes(model: Any, wanted: Wanted) -> int:
    """Memory that recording takes, before anything runs."""
    numbers = sum(wanted.numbers(model, sigma) for sigma in source_levels(wanted))
    return numbers * wanted.trajectory.pictures * torch.empty(0, dtype=model.model.get_dtype_inference()).element_size()


def free_memory() -> int:
    """Bytes of ordinary memory that are free."""
    import comfy.model_management

    return int(comfy.model_management.get_free_memory(torch.device("cpu")))
