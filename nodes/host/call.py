"""One sampling run and one model call, as every technique needs to know them, noted once for all.

The host tells what a layer is doing in pieces: a guider names its prompts, CALC_COND_BATCH still has their areas,
APPLY_MODEL has noise level, latent and rows, and a layer sees only what is left in the options. `observe` puts wrappers
on a clone that gather this into one `ModelCall`; a technique's own patch asks `call_of(options)` for it. What a
technique keeps over a run or over a call lies in `Run.kept` and `ModelCall.kept`, and is gone with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from .adapted import IDS, TEXT, phrase_starts, with_phrases
from .areas import Area, area_of
from .frames import EVERY, Frames, shown_frames
from .model import Grid

NAME = "palimpsest"  # our key among the host's wrappers, and the call's in its options
RUN, PROMPTS, AREAS, LEVEL = NAME + ".run", NAME + ".prompts", NAME + ".areas", NAME + ".level"
FRAMES = NAME + ".frames"

Thing = TypeVar("Thing")


# ---- what there is to know ------------------------------------------------------------------------------------------


def require_span(start_percent: float, end_percent: float) -> None:
    """Raise ValueError where no step is left between two shares of the sampling."""
    if start_percent >= end_percent:
        raise ValueError(
            f"start_percent {start_percent:g} and end_percent {end_percent:g} leave no step between them: set "
            "start_percent below end_percent (0 and 1 for all of the sampling)."
        )


@dataclass(frozen=True)
class Window:
    """The noise levels sigma_start >= sigma > sigma_end at which something acts."""

    sigma_start: float
    sigma_end: float
    always: bool = False

    @classmethod
    def of(cls, model: Any, start_percent: float, end_percent: float) -> Window:
        """From shares of the sampling, 0 the noisiest. Raises ValueError where no step is left between them."""
        require_span(start_percent, end_percent)
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        always = start_percent <= 0.0 and end_percent >= 1.0
        start = math.inf if start_percent <= 0.0 else to_sigma(start_percent)  # the noisiest level may round above 1
        return cls(start, to_sigma(end_percent), always)

    def __contains__(self, sigma: float) -> bool:
        return self.sigma_end < sigma <= self.sigma_start


@dataclass(frozen=True, eq=False)
class Prompt:
    """A sampled prompt: its text (B, L, D) or None, and whether the host takes it for a negative one.

    encoded: what the network made that text of, where it makes another one (Anima). phrases: the first row of each
    phrase behind it, by name.
    """

    text: Tensor | None
    negative: bool
    encoded: Tensor | None = None
    phrases: Mapping[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens L."""
        return 1 if self.text is None else self.text.shape[1]


class Keeps:
    """Holds what techniques keep, by name."""

    def __init__(self) -> None:
        self.things: dict[Hashable, Any] = {}

    def kept(self, name: Hashable, make: Callable[[], Thing]) -> Thing:
        """What is kept under a name, made when it is first asked for."""
        if name not in self.things:
            self.things[name] = make()
        return self.things[name]


class Run(Keeps):
    """One sampling run: its prompts, and what techniques keep as long as it lasts.

    conds: the guider's prompts by the name it gives them. Without a guider, in a model call from outside of a run, the
    run is as long as the call.
    """

    def __init__(self, conds: Mapping[str, list | None] | None = None) -> None:
        super().__init__()
        self.conds = {name: list(group or ()) for name, group in (conds or {}).items()}
        named = [(cond, name) for name, group in self.conds.items() for cond in group]
        self.negative = {cond["uuid"]: cond.get("prompt_type", name) == "negative" for cond, name in named}
        self.prompts: dict[tuple, Prompt] = {}
        self.made_of: dict[int, tuple[Tensor | None, dict[str, int]]] = {}

    @property
    def every_cond(self) -> list[dict]:
        """The guider's prompts, of all names."""
        return [cond for group in self.conds.values() for cond in group]

    def note(self, conds: list[list | None], frames: Frames = EVERY) -> dict[tuple, Prompt]:
        """The prompts of a model call by (index of their group, host's id): one object for one prompt in all calls.

        A group is what the guider named it, which the host's copies at its end do not tell. One that the guider does
        not know is another node's. A text for every frame is cut anew in every call: there the window names it.
        """
        found = {}
        for index, group in enumerate(conds):
            for cond in group or ():
                kind = group[0].get("prompt_type") == "negative"
                text, negative = sampled_text(cond), self.negative.get(group[0]["uuid"], kind)
                made_of = self.made_of.setdefault(id(text), parts_of(cond, text))  # copies stand behind what they copy
                cut = frames.shown is not None and text is not None and len(text) > 1
                name = (index, cond["uuid"], frames) if cut else id(text)
                kept = self.prompts.get((name, negative))
                if kept is None or (cut and not same_text(kept.text, text)):
                    kept = self.prompts[name, negative] = Prompt(text, negative, *made_of)
                found[index, cond["uuid"]] = kept
        return found


def sampled_text(cond: dict) -> Tensor | None:
    """What the model sees of one of the host's prompts.

    Beside a prompt limited to an area the host puts copies of that one among the others, with their text in
    model_conds only; even its id is the same.
    """
    found = cond.get("model_conds", {}).get(TEXT)
    return cond.get("cross_attn") if found is None else found.cond


def parts_of(cond: dict, text: Tensor | None) -> tuple[Tensor | None, dict[str, int]]:
    """(what a text encoder gave for one of the host's prompts, where the network makes another text of it; where the
    phrases behind it begin in that text)."""
    encoded = cond.get("cross_attn") if cond.get(IDS) is not None else None
    return encoded, {} if text is None else phrase_starts(cond, text.shape[1])


def same_text(a: Tensor, b: Tensor) -> bool:
    """Whether two texts are equal in shape and content."""
    return a.shape == b.shape and bool((a == b).all())


@dataclass(frozen=True, eq=False)
class ModelCall(Keeps):
    """One call of the host's model.

    sigmas (R,): noise levels. prompts, areas: one for each chunk of rows, in their order; an area is None where a
    prompt covers the picture. pictures B: rows of a chunk, so that R = chunks * B; frames: which of a clip these are,
    where the host samples it in windows. latent (H, W): of x, which is the area's where prompts are limited to one.
    text_length: tokens of the text that is joined with the picture's in a transformer, or attended to in a U-Net; 0
    without. model: the host's BaseModel.
    """

    sigmas: Tensor
    prompts: tuple[Prompt | None, ...]
    areas: tuple[Area | None, ...]
    pictures: int
    latent: Grid
    text_length: int
    model: Any
    run: Run
    frames: Frames = EVERY
    things: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def clip(self) -> int:
        """Pictures that are sampled together, of which this call may hold some only."""
        return self.pictures if self.frames.shown is None else self.frames.clip

    @property
    def chunks(self) -> int:
        """Prompts that the host stacked in the rows of this call."""
        return len(self.prompts)

    @cached_property
    def sigma(self) -> float:
        """Its noise level, read from the device once, and only where something asks."""
        return float(self.sigmas.flatten()[0])

    @property
    def has_areas(self) -> bool:
        """Whether a prompt of this call is limited to an area."""
        return any(self.areas)

    def within(self, window: Window) -> bool:
        """Whether its noise level lies in a window."""
        return window.always or self.sigma in window

    def picture_tokens(self, patch: int) -> slice:
        """Where the picture's tokens stand in a transformer's joint sequence, of patches of patch x patch of x."""
        height, width = (-(-side // patch) for side in self.latent)
        return slice(self.text_length, self.text_length + height * width)


def call_of(options: dict) -> ModelCall | None:
    """The call that a patch acts in; None where no sampler runs the model (a node of another pack calls it bare)."""
    return options.get(NAME)


def frames_of(options: dict) -> Frames:
    """The frames of the call that a patch acts in."""
    call = call_of(options)
    return EVERY if call is None else call.frames


def acts(window: Window, options: dict) -> bool:
    """Whether a patch that acts within a window acts in this call; outside of a sampler, only one that always does."""
    call = call_of(options)
    return window.always if call is None else call.within(window)


def run_of(model_options: dict) -> Run:
    """The run that a sampler's wrapper acts in."""
    return model_options["transformer_options"][RUN]


def noise_level(timestep: Tensor, model_options: dict) -> tuple[float, dict]:
    """The noise level of a PREDICT_NOISE wrapper's call, and the options to pass on.

    The options know it from then on, so that of several wrappers only the first reads it from the device.
    """
    options = model_options["transformer_options"]
    tensor, sigma = options.get(LEVEL, (None, 0.0))
    if tensor is timestep:
        return sigma, model_options
    sigma = float(timestep.flatten()[0])
    return sigma, model_options | {"transformer_options": options | {LEVEL: (timestep, sigma)}}


# ---- what gathers it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerRun:
    """OUTER_SAMPLE wrapper: one Run for every sampling run, gone when it ends.

    begin: called with (guider, run) before it, for checks and preparations.
    """

    begin: Callable[[Any, Run], None] | None = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        first = RUN not in options
        run = options.setdefault(RUN, Run(guider.conds) if first else None)
        try:
            if self.begin is not None:
                self.begin(guider, run)
            return executor(*args, **kwargs)
        finally:
            if first:
                options.pop(RUN, None)


def note_prompts(
    executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict, **kwargs: Any
) -> Any:
    """CALC_COND_BATCH wrapper: note prompts, areas and frames while the host still names them, and add phrases."""
    options = model_options.get("transformer_options", {})
    run, frames = options.get(RUN) or Run(), shown_frames(model_options, x)
    conds = with_phrases(conds, model, x.device, run.kept)
    areas = areas_of(conds, tuple(x.shape[2:]))
    noted = {RUN: run, PROMPTS: run.note(conds, frames), AREAS: areas, FRAMES: frames}
    return executor(model, conds, x, timestep, model_options | {"transformer_options": options | noted}, **kwargs)


def areas_of(conds: list[list | None], sides: tuple[int, ...]) -> dict[Any, Area]:
    """The areas of a call's prompts by the host's id, on a latent of (H, W) or (F, H, W)."""
    limited = [cond for group in conds for cond in group or () if cond.get("area")]
    return {cond["uuid"]: area_of(cond["area"], sides) for cond in limited}


class EachCall:
    """APPLY_MODEL wrapper: what stands in the options of a call is made anew for it."""

    def prepared(self, model: Any, x: Tensor, t: Tensor, text: Tensor | None, options: dict, conds: dict) -> dict:
        """The options to go on with: those given, which may be changed; conds: what else the model is given."""
        raise NotImplementedError

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
    ) -> Any:
        given = {"text": c_crossattn, "options": dict(transformer_options or {}), "conds": kwargs}
        options = self.prepared(executor.class_obj, x, t, **given)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


class NoteCall(EachCall):
    """Tells the layers which call they are in."""

    def prepared(self, model: Any, x: Tensor, t: Tensor, text: Tensor | None, options: dict, conds: dict) -> dict:
        if "cond_or_uncond" in options:
            options[NAME] = described(model, x, t, text, options)
        return options


def described(model: Any, x: Tensor, t: Tensor, text: Tensor | None, options: dict) -> ModelCall:
    """The call from what APPLY_MODEL is given."""
    groups, ids = options["cond_or_uncond"], options.get("uuids") or [None] * len(options["cond_or_uncond"])
    prompts, areas = options.get(PROMPTS, {}), options.get(AREAS, {})
    return ModelCall(
        sigmas=t,
        prompts=tuple(prompts.get(row) for row in zip(groups, ids, strict=True)),
        areas=tuple(map(areas.get, ids)),
        pictures=len(x) // max(len(groups), 1),
        latent=tuple(x.shape[-2:]),
        text_length=0 if text is None else text.shape[1],
        model=model,
        run=options.get(RUN) or Run(),
        frames=options.get(FRAMES, EVERY),
    )


def observe(patched: Any) -> None:
    """Let `call_of` and `run_of` know on a clone; a second time it does nothing. Before a technique's own wrappers."""
    from comfy.patcher_extension import WrappersMP

    if not patched.get_wrappers(WrappersMP.OUTER_SAMPLE, NAME):
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, NAME, PerRun())
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, note_prompts)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, NAME, NoteCall())


def each_run(patched: Any, name: str, begin: Callable[[Any, Run], None]) -> None:
    """Call `begin(guider, run)` at the start of every sampling run of a clone."""
    from comfy.patcher_extension import WrappersMP

    observe(patched)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, name, PerRun(begin))
