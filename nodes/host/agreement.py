"""Whether a sampling run goes the way that was recorded of a picture: noise levels, start, sampler and guidance.

A run that goes another way still draws, only worse, so that it is not refused: a sentence for each difference goes
under the node, into the log, and into the history of the prompt that samples.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flow import is_flow_sampling
from .sampling import OF_A_NODE
from .trajectory import Trajectory, same_latent
from .ui import node_id, show_text

NEAR_LEVEL = 1e-3  # relative: schedules are rounded
ROUNDING = 1e-2  # what Invert Picture's inverted_noise leaves of a noise of 1, where the latent is the recorded one
QUIET = {"res_multistep", "res_multistep_cfg_pp"}  # take a noise_sampler, for their ancestral forms alone
KEPT = 100  # remarks that a node's history holds, of several prompts and samplers


# ---- where it is said -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Remarks:
    """What a node says of the sampling runs of its model.

    node: its id; text: what `told` put under it. entries: {prompt_id, node_id of the sampler, text} of the last runs,
    in a list that `told` puts into the node's `ui`: the host keeps that list itself, so that the history shows what is
    said after the node has run.
    """

    node: Any
    text: str = ""
    entries: list[dict[str, str]] = field(default_factory=list)
    said: bool = False

    @classmethod
    def of(cls, node: Any) -> Remarks:
        """Of the node that runs."""
        return cls(node_id(node))

    def say(self, sentences: list[str]) -> None:
        """What is to be said of the run that begins; nothing takes back what was said of the one before."""
        if sentences or self.said:
            show_text(self.node, ". ".join(sentences) or self.text)
        self.said = bool(sentences)
        self.note(sentences)

    def say_once(self, run: Any, sentence: str) -> None:
        """What is found in the middle of a run (call.Run), unless that run has heard it."""

        def said() -> bool:
            show_text(self.node, sentence)
            self.said = True
            self.note([sentence])
            return True

        run.kept((self, sentence), said)

    def note(self, sentences: list[str]) -> None:
        """Put sentences into the log and the history."""
        prompt, sampler = executing()
        for sentence in sentences:
            logging.warning("[palimpsest] node %s: %s", self.node, sentence)
            self.entries.append({"prompt_id": prompt, "node_id": sampler, "text": sentence})
        del self.entries[:-KEPT]


UNHEARD = Remarks(None)  # of what no node asked for: the log alone has it


def executing() -> tuple[str, str]:
    """(prompt, node) that the host executes here; empty outside of a graph."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return ("", "") if context is None else (context.prompt_id, context.node_id)


# ---- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The latents (B, C, H, W) in the sampler's space x = x_0 + sigma eps that a run begins with.

    Of a flow-matching model (flow), which mixes the two, latent is the mixture and noise is 0.
    """

    noise: Tensor
    latent: Tensor
    flow: bool = False

    @classmethod
    def of(cls, sampling: Any, sigmas: Tensor, noise: Tensor, latent: Tensor | None) -> Start:
        """From what the host's samplers are given."""
        latent = torch.zeros_like(noise) if latent is None else latent
        if not is_flow_sampling(sampling):
            return cls(noise, latent)
        mixed = sampling.noise_scaling(sigmas[:1].to(noise), noise, latent)
        return cls(torch.zeros_like(noise), mixed.squeeze(2) if mixed.ndim == 5 else mixed, flow=True)

    @property
    def adds_noise(self) -> bool:
        """Whether noise is added to the latent."""
        return bool((self.noise.abs() > ROUNDING).any())

    def is_at(self, recorded: Tensor) -> bool:
        """Whether the latent is a recorded one, (B or 1, C, H, W); each of a batch."""
        return same_latent(self.latent, recorded)


@dataclass(frozen=True, eq=False)
class Recorded:
    """What is known of the way on which a picture was recorded.

    how: "tuned" or "inverted"; sigmas: T+1 levels, descending; start(BaseModel) -> latents (B, C, H, W) at the first
    of them, in the sampler's space; apart: what other levels mean, as half a sentence. guidance: None for any.
    from_start: edits begin with `start`; else only noise on top of it is wrong. exact: fresh noise loses the picture.
    contextual: a context adapter shifts the way, which only its sampler undoes.
    """

    how: str
    sigmas: tuple[float, ...]
    start: Callable[[Any], Tensor]
    apart: str
    guidance: float | None = None
    from_start: bool = True
    exact: bool = True
    contextual: bool = False

    @classmethod
    def of(cls, trajectory: Trajectory, apart: str, **more: Any) -> Recorded:
        """An inverted picture."""
        more = {"contextual": trajectory.contextual} | more
        return cls("inverted", trajectory.sigmas, lambda model: trajectory.latents[0], apart, **more)

    def against(self, guider: Any, sampler: Any, sigmas: Tensor, start: Start) -> list[str]:
        """A sentence for each way in which a run differs; none of one that inverts."""
        levels = sigmas.tolist()
        if levels[0] <= levels[-1]:
            return []
        found = [
            self.other_levels(levels),
            self.other_start(start, guider.inner_model) if near(levels[0], self.sigmas[0]) else None,
            self.fresh_noise(sampler),
            self.without_context(sampler),
            self.other_guidance(guider),
        ]
        return [sentence for sentence in found if sentence]

    def other_levels(self, levels: list[float]) -> str | None:
        """Steps or spacing that are not the recorded ones; a part of these is right."""
        steps, recorded = len(levels) - 1, len(self.sigmas) - 1
        if is_part(levels, self.sigmas):
            return None
        if steps != recorded:
            return (
                f"the picture was {self.how} in {recorded} steps and is sampled in {steps}: {self.apart}; set steps to "
                f"{recorded}, with the same scheduler"
            )
        return (
            f"the picture was {self.how} at other noise levels than it is sampled at: {self.apart}; set the same "
            "scheduler, and denoise to 1"
        )

    def other_start(self, start: Start, model: Any) -> str | None:
        """Noise that is added, or another latent than the recorded one."""
        recorded = self.start(model)
        if start.adds_noise and start.is_at(recorded):
            return (
                "noise is added to the picture's inverted noise, which drowns it: set add_noise to disable, or connect "
                "DisableNoise"
            )
        if not self.from_start or (not start.adds_noise and start.is_at(recorded)):
            return None
        if start.flow:
            return (
                "sampling does not begin with the picture's inverted noise: connect inverted_noise of Invert Picture "
                "to SamplerCustomAdvanced"
            )
        what = "fresh noise" if start.adds_noise else "another latent"
        return (
            f"sampling begins with {what}, not with the picture's inverted noise: connect noise of Invert Picture or "
            "Load KV as latent, with add_noise disabled"
        )

    def fresh_noise(self, sampler: Any) -> str | None:
        """A sampler that adds noise at every step."""
        if self.exact and adds_noise(sampler):
            return f"sampler {sampler_name(sampler)} adds fresh noise at every step, which loses the picture: set euler"
        return None

    def without_context(self, sampler: Any) -> str | None:
        """A sampler that goes down past the bias that the latents have."""
        if not self.contextual or getattr(getattr(sampler, "sampler_function", None), "contextual", False):
            return None
        return (
            f"the picture was {self.how} with a context adapter and is sampled by {sampler_name(sampler)}: connect the "
            "Context-Aware Sampler, with the same adapter"
        )

    def other_guidance(self, guider: Any) -> str | None:
        """A guidance other than the one of the tuning; guiders with several have none to compare."""
        guidance = None if hasattr(guider, "cfg1") else getattr(guider, "cfg", None)
        if self.guidance is None or guidance is None or near(guidance, self.guidance):
            return None
        return (
            f"the picture was {self.how} at guidance {self.guidance:g} and is sampled at {guidance:g}: set cfg to "
            f"{self.guidance:g}, or tune again at {guidance:g}"
        )


def near(a: float, b: float) -> bool:
    """Whether two levels or guidances are the same."""
    return math.isclose(a, b, rel_tol=NEAR_LEVEL, abs_tol=1e-6)


def is_part(levels: list[float], recorded: tuple[float, ...]) -> bool:
    """Whether levels are some of the recorded ones in a row; the last may be 0, where a sampler is to end there."""
    first = next((i for i, level in enumerate(recorded) if near(level, levels[0])), None)
    if first is None or first + len(levels) > len(recorded):
        return False
    pairs = list(itertools.zip_longest(levels, recorded[first : first + len(levels)]))
    return all(near(*pair) for pair in pairs[:-1]) and (levels[-1] == 0 or near(*pairs[-1]))


def sampler_name(sampler: Any) -> str:
    """A sampler as its list calls it."""
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__)
    return name.removeprefix("sample_").removesuffix("_function")


def adds_noise(sampler: Any) -> bool:
    """Whether a host sampler draws noise while it steps (ancestral, SDE, LCM, churn), by what its function takes.

    A function of our own says it itself, by `adds_noise`.
    """
    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    if function is None or sampler_name(sampler) in QUIET:
        return False
    if hasattr(function, "adds_noise"):
        return bool(function.adds_noise)
    taken = {name: options.get(name, each.default) for name, each in inspect.signature(function).parameters.items()}
    if isinstance(taken.get("s_churn"), int | float) and taken["s_churn"] > 0:
        return True
    return "noise_sampler" in taken and all(taken.get(name, 1.0) != 0 for name in ("eta", "s_noise"))


# ---- when -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CompareRuns:
    """SAMPLER_SAMPLE wrapper: say at the start of every sampling run in what it differs; a node's own runs are not."""

    recorded: Recorded
    remarks: Remarks

    def __call__(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *args: Any, **kwargs: Any) -> Any:
        if OF_A_NODE not in extra_args["model_options"].get("transformer_options", {}):
            _, noise, latent, *_ = args
            start = Start.of(guider.inner_model.model_sampling, sigmas, noise, latent)
            self.remarks.say(self.recorded.against(guider, executor.class_obj, sigmas, start))
        return executor(guider, sigmas, extra_args, *args, **kwargs)


def compare_runs(patched: Any, recorded: Recorded, remarks: Remarks) -> None:
    """Let a node say, of every sampling run of a clone, in what it differs from what was recorded."""
    from comfy.patcher_extension import WrappersMP

    name = f"palimpsest.agreement.{uuid.uuid4().hex}"
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, name, CompareRuns(recorded, remarks))
