"""Apply KV: the edit is drawn with a tuned picture in view."""

from __future__ import annotations

from functools import partial

import latent_preview
from comfy_api.latest import io
from torch import Tensor

from .. import host, inputs, sockets
from ..settings import AS_SET, AS_SET_ABOVE
from . import changes
from .joint import ready
from .modes import MODES
from .sampling import apply, burns_in, how_to_sample
from .settings import PRESET_TOOLTIP, ApplySettings


class ApplyKV(io.ComfyNode):
    """Stage 3 of KV Inversion: sample with the tuned keys and values in self-attention."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestApplyKV",
            display_name="Apply KV",
            category="palimpsest/inversion",
            description="Gives the model the keys and values that were recorded or learned of your picture. Sample "
            "from the inverted noise with a new prompt: it sets the pose, the picture brings texture and identity.",
            search_aliases=[
                "kv inversion",
                "masactrl",
                "action editing",
                "keep identity",
                "consistent edit",
                "pose",
                "identity",
                "face",
                "person",
                "consistent character",
                "edit photo",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples the edit. Patches of other nodes stay active."),
                sockets.KV.Input("kv", tooltip="From Tune KV or Load KV."),
                io.Combo.Input("preset", options=[AS_SET, *ApplySettings.PRESETS], tooltip=PRESET_TOOLTIP),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="extend (default): the edit looks at itself and at the source. recompute: the paper's "
                    "Algorithm 1, the edit's own keys and values with the learned ones blended in. frozen: only at the "
                    "source.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the source is used. 1: as learned. 0: the plain model, bit for bit. 0.5 to "
                    "0.8 frees the pose.",
                ),
                io.Float.Input(
                    "source_guidance",
                    default=3.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How hard to insist on the source's look, as guidance does for the prompt. 1: off. 2 to 4; "
                    "small models take more. More brings coat, collar and colours back, too much burns them in. Half "
                    "as much time again a step.",
                ),
                *inputs.percents(
                    start="When the source begins to act, as a share of the sampling. 0 to 0.4: later lets the prompt "
                    "lay out a new pose first. 0.1 (default): MasaCtrl's, which begins after 4 of 50 steps.",
                    end="When the source stops acting. 1 keeps the finest texture; earlier lets the model finish on "
                    "its own.",
                    default_start=0.1,
                ),
                io.Combo.Input(
                    "layers",
                    options=["all", "decoder", "encoder", "middle"],
                    advanced=True,
                    tooltip="Which of the tuned layers act. all: every layer that was tuned.",
                ),
                io.Float.Input(
                    "look_ahead",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Modes frozen and extend: show the edit the source as it was later in its own sampling, "
                    "where coat and texture are clearer. 0: at the same step. 0.1 to 0.3: more texture. 1: the "
                    "finished source.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the source may act in the edited picture: white follows the source, black is left "
                    "to the model. For two subjects, one Apply KV after the other, each with its mask.",
                ),
                io.Mask.Input(
                    "source_mask",
                    optional=True,
                    tooltip="Which part of the source picture may be looked at: white only, for instance the subject, "
                    "so that nothing of the old background comes along.",
                ),
                io.Combo.Input(
                    "what_changes",
                    options=list(changes.OPTIONS),
                    optional=True,
                    tooltip="as set above (default): the values above act. Else mode extend, and start_percent and "
                    "source_guidance for this kind of edit: action and species insist on the source's look; colour or "
                    "material does not, or the old coat returns; place does, with the subject in source_mask. The line "
                    "under the node says what was set.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the source's keys and values.")],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, kv, mask=None, source_mask=None, what_changes=AS_SET_ABOVE, **chosen) -> io.NodeOutput:
        """Patch a clone; what does not fit the tuning is told when it samples."""
        remarks = host.Remarks.of(cls)
        settings, said = changes.settled(chosen, what_changes, source_mask is not None)
        kv = ready(model, kv, settings, partial(latent_preview.prepare_callback, model))
        patched = apply(model, kv, settings, mask, source_mask, remarks=remarks)
        told = "; ".join(filter(None, (said, unpainted(mask), how_to_sample(kv), burns_in(kv, settings))))
        return io.NodeOutput(patched, ui=host.told(cls, told, remarks))


def unpainted(mask: Tensor | None) -> str:
    """What is to be said of a mask as Load Image gives it for an unpainted picture."""
    if mask is None or host.one_colour(mask) != "black":
        return ""
    return (
        "the mask is black all over, so that the source acts nowhere: paint where it may act, in Load Image's mask "
        "editor, or disconnect it"
    )
