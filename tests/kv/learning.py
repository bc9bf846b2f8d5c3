"""Ways to look at learned and recorded keys and values together, each tried on the same scenes (docs/results.md).

Goal: identity at least that of mode extend on a recorded source, background at least that of frozen on a tuned one,
each pose followed. What is not a mode of Apply KV is put together here, from the node's own parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.samplers
import torch
from palimpsest.kernels.kv_inversion import source_guidance
from palimpsest.nodes import host
from palimpsest.nodes.kv import sampling
from palimpsest.nodes.kv.embeddings import LEARNED, SOURCE
from palimpsest.nodes.kv.modes import MODES, Extend, Mode, Recompute
from palimpsest.nodes.kv.settings import WEIGHTS
from palimpsest.nodes.kv.tokens import Part
from torch import Tensor

AROUND = 17  # pixels that an animal's mask is widened by, across
SHOWN = "palimpsest_kv.tried"  # in the options of a model call: the role of the sources that are looked at in it
BASE, PUSH = "base", "push"


class ExtendLearned(Extend):
    """K_bar, V_bar of the exact path behind the edit's own keys and values."""

    needs = (LEARNED, SOURCE)

    def shown(self, learned, mask):
        """As mode frozen shows them."""
        return MODES["frozen"].shown(learned, mask)


@dataclass(frozen=True)
class OwnWeighted(Mode):
    """Mode `base`, in which each of the edit's own keys counts `weight` times: ln(weight) is added to its scores."""

    base: Mode
    weight: float
    longer = True

    @property
    def needs(self):
        """What the base reads."""
        return self.base.needs

    def shown(self, learned, mask):
        """What the base shows."""
        return self.base.shown(learned, mask)

    def act(self, tokens, shown, strength):
        """The bias on the layer's own keys, then the base."""
        own = tokens.own
        tokens.own = Part(own.key, own.value, own.key.new_full((1, own.count), math.log(self.weight)))
        self.base.act(tokens, shown, strength)


class UnconditionalStep(sampling.CurrentStep):
    """Mode recompute in the negative prompt's rows alone: in the others lambda is 1 and K_hat, V_hat are 0."""

    def rows(self, source, options, rows):
        """What a layer is shown, for all rows of the call."""
        shown, chunks = super().rows(source, options, rows), options["cond_or_uncond"]
        chosen = torch.tensor([prompt == 1 for prompt in chunks]).repeat_interleave(rows // len(chunks))
        chosen = chosen[:, None, None].to(shown.key)
        return type(shown)(
            shown.key * chosen,
            shown.value * chosen,
            1 + chosen * (shown.own_key - 1),
            1 + chosen * (shown.own_value - 1),
        )


class UnconditionalSource(sampling.Source):
    """A source that acts in the negative prompt's rows alone."""

    def current_step(self, call, device):
        """As for any source, with other rows."""
        step = super().current_step(call, device)
        return None if step is None else UnconditionalStep(**vars(step))


class BaseSource(sampling.Source):
    """What is looked at in the model calls of the sampler."""

    role = BASE

    def acts_in(self, options: dict) -> bool:
        """Whether this call looks at sources of this role."""
        call = host.call_of(options)
        return call is not None and options.get(SHOWN, BASE) == self.role and call.within(self.window)


class PushSource(BaseSource):
    """What is looked at only where source guidance asks in which direction it pushes."""

    role = PUSH


@dataclass(frozen=True)
class Push:
    """Post-CFG function: (s - 1) (D(no text, pushing source) - D(no text, none)) is added, two more rows a step."""

    scale: float

    def __call__(self, args: dict) -> Tensor:
        shown, hidden = (self.denoised(args, role) for role in (PUSH, None))
        return source_guidance(args["denoised"], shown, hidden, self.scale)

    def denoised(self, args: dict, role: str | None) -> Tensor:
        """D(no text, sources of a role)."""
        options = args["model_options"].get("transformer_options", {}) | {SHOWN: role}
        options = args["model_options"] | {"transformer_options": options}
        (found,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["uncond"]], args["input"], args["sigma"], options
        )
        return found


@dataclass(frozen=True)
class Look:
    """One source to look at: what gives its embeddings, how, how hard to insist, when, and where."""

    kv: Callable[[], Any]
    mode: Mode
    guidance: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    source_mask: Tensor | None = None
    kind: type = sampling.Source

    def added_to(self, model: Any) -> Any:
        """A clone of the model that looks at it."""
        patched, kv = model.clone(), self.kv()
        source = self.kind(
            kv=kv,
            layers={layer.key: layer for layer in kv.layers},
            mode=self.mode,
            window=host.Window.of(model, self.start, self.end),
            mask=self.mask,
            source_mask=self.source_mask,
        )
        sampling.install(patched, source)
        if self.guidance != 1.0:
            scale = self.guidance
            guide = Push(scale) if self.kind is PushSource else sampling.SourceGuidance(source, scale)
            patched.set_model_sampler_post_cfg_function(guide)
        return patched


class Ways:
    """All that was tried, in groups; each way is its name and what is looked at, one source after the other.

    tuned, weights, recorded: functions that give the embeddings, each made when a way first looks at them.
    """

    def __init__(self, tuned: Callable, weights: Callable, recorded: Callable, subject: Tensor):
        self.tuned, self.weights, self.recorded, self.subject = tuned, weights, recorded, subject

    def recompute(self, guidance=1.0, start=0.0, end=1.0, **more) -> Look:
        return Look(self.tuned, Recompute(), guidance, start, end, **more)

    def frozen(self, guidance=1.0, start=0.0, end=1.0, **more) -> Look:
        return Look(self.tuned, MODES["frozen"], guidance, start, end, **more)

    def extend(self, guidance=10.0, start=0.0, end=1.0, **more) -> Look:
        return Look(self.recorded, MODES["extend"], guidance, start, end, **more)

    def learned(self, guidance=10.0, **more) -> Look:
        return Look(self.tuned, ExtendLearned(), guidance, **more)

    def all(self) -> Iterator[tuple[str, list[Look]]]:
        """(name, sources) of every way."""
        yield "extend, recorded", [self.extend()]
        yield "frozen, tuned", [self.frozen()]
        yield "recompute, tuned", [self.recompute()]
        for group in (self.guided, self.behind, self.weighted, self.masked, self.in_turn, self.pushed, self.less):
            yield from group()

    def guided(self):
        """Source guidance on what was learned, always or in half of the steps."""
        for scale in (2.0, 3.0, 5.0):
            yield f"frozen, source guidance {scale:g}", [self.frozen(scale)]
            yield f"recompute, source guidance {scale:g}", [self.recompute(scale)]
        for scale in (3.0, 5.0):
            yield f"frozen, source guidance {scale:g} until 0.5", [self.frozen(scale, 0.0, 0.5), self.frozen(1.0, 0.5)]
            yield f"frozen, source guidance {scale:g} from 0.5", [self.frozen(1.0, 0.0, 0.5), self.frozen(scale, 0.5)]

    def behind(self):
        """K_bar, V_bar of the exact path behind the edit's own, as they are or changed by what was learned."""
        for scale in (1.0, 3.0, 10.0):
            yield f"extend by the learned, source guidance {scale:g}", [self.learned(scale)]
        for scale in (5.0, 10.0):
            yield f"recompute and learned behind, {scale:g}", [self.recompute(), self.learned(scale)]
            yield f"recompute and recorded behind, {scale:g}", [self.recompute(), self.extend(scale)]

    def weighted(self):
        """The edit's own keys count less."""
        for weight in (0.5, 0.25, 0.1):
            for scale in (3.0, 10.0):
                for name, look in (("recorded", self.extend()), ("learned", self.learned())):
                    mode = OwnWeighted(look.mode, weight)
                    yield f"extend, {name}, own keys x {weight:g}, {scale:g}", [Look(look.kv, mode, scale)]

    def masked(self):
        """The learned outside of the animal, the recorded within."""
        subject, around = self.subject, 1 - widened(self.subject)
        yield (
            "frozen outside, extend the subject, 10",
            [
                self.frozen(source_mask=1 - subject),
                self.extend(source_mask=subject),
            ],
        )
        yield "extend, and recompute in a mask outside", [self.extend(), self.recompute(mask=around)]
        outside = self.recompute(source_mask=around)
        yield "recompute outside, extend, 10", [outside, self.extend()]
        yield "recompute outside, extend the subject, 10", [outside, self.extend(source_mask=subject)]
        yield "recompute outside, learned behind, 10", [outside, self.learned()]

    def in_turn(self):
        """The recorded early, the learned late."""
        for share in (0.3, 0.6):
            yield f"extend until {share:g}, then frozen", [self.extend(end=share), self.frozen(1.0, share)]
            yield f"extend until {share:g}, then recompute", [self.extend(end=share), self.recompute(1.0, share)]
            yield f"extend, with recompute from {share:g}", [self.recompute(1.0, share), self.extend()]

    def pushed(self):
        """The learned in all rows, the recorded only as the direction of source guidance."""
        for scale in (5.0, 10.0):
            push = self.extend(scale, kind=PushSource)
            for name in ("frozen", "recompute"):
                yield f"{name}, recorded as the push, {scale:g}", [getattr(self, name)(kind=BaseSource), push]

    def less(self):
        """Only lambda and gamma learned; what was learned in the negative prompt's rows alone."""
        for name in ("recompute", "frozen"):
            yield f"{name}, weights only", [Look(self.weights, MODES[name])]
        negative = self.recompute(kind=UnconditionalSource)
        yield "recompute in the negative rows", [negative]
        yield "recompute in the negative rows, extend, 10", [negative, self.extend()]


def widened(mask: Tensor) -> Tensor:
    """A mask (B, H, W) with its white grown by half of AROUND to all sides."""
    return torch.nn.functional.max_pool2d(mask[:, None], AROUND, 1, AROUND // 2)[:, 0]


def tried(scenes: Any, guidance: float, wanted: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, edited pictures) of the ways named, of every way where none is."""

    def made(**changes: Any) -> Callable[[], Any]:
        return cache(lambda: scenes.tune(guidance=guidance, **changes)[0])

    tuned, weights, recorded = made(), made(learn=WEIGHTS), made(inner_steps=0)
    for name, looks in Ways(tuned, weights, recorded, scenes.masks).all():
        if not wanted or name in wanted:
            model = scenes.model
            for look in looks:
                model = look.added_to(model)
            yield name, scenes.draw(model, scenes.poses.prompt, guidance)
