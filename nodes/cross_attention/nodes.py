"""Words act in a mask; a part of the picture has its own phrase."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host, inputs, sockets
from .layers import LAYERS, PFB_OBJECT
from .masking import INSIDE, OUTSIDE, MaskSettings, mask_words, report
from .phrases import PhraseSettings, add_phrase
from .phrases import report as phrase_report
from .regions import MODES

MODE_TOOLTIP = (
    "What happens to a masked word. after softmax: its share of the attention is taken away and nobody gets it (the "
    "paper's equation 2). after softmax, renormalised: the prompt's other words get it. before softmax (PFB-Diff): the "
    "same with a mask cut at one half, which leaves little of a feather."
)
LAYERS_TOOLTIP = (
    "Where in the network the mask acts. all: everywhere, the tightest hold. PFB-Diff object and background: the "
    "coarser layers its authors chose, which leaves fine detail to the model. 1/1 to 1/8 of the latent: the layers of "
    "one grid size. custom: those listed in custom_layers. Transformers have one grid: all, or custom."
)


class CrossAttentionMask(io.ComfyNode):
    """Cross-attention masking, as the paper writes it and as PFB-Diff's authors built it."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestCrossAttentionMask",
            display_name="Cross-Attention Mask",
            category="palimpsest/regions",
            description="Lets words of the prompt act only where you say: inside or outside a mask. Chain one for each "
            "region; the rest of the picture does not see the word.",
            search_aliases=[
                "cam",
                "regional prompt",
                "mask words",
                "attention couple",
                "pfb-diff",
                "attention mask",
                "recolour",
                "recolor",
                "change color",
                "change colour",
                "region",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples. Patches of other nodes stay active."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the words act: white is yes, black is no, grey in between. Any size; one for the "
                    "whole batch, or one for each picture of it; of a video one for each frame.",
                ),
                io.Combo.Input("mode", options=list(MODES), tooltip=MODE_TOOLTIP),
                io.Combo.Input(
                    "side",
                    options=[INSIDE, OUTSIDE],
                    tooltip="inside: the words act in the mask's white part. outside: in its black part, for instance "
                    "the old subject's name kept off the new background.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of a word is held back where it may not act. 1: all of it. 0.5: it keeps half "
                    "its weight there. 0: the plain model, bit for bit.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=512.0,
                    step=1.0,
                    tooltip="Softens the mask's edge over this many of its pixels on either side. 0: as painted. 8 "
                    "to 32 hide a seam between two regions.",
                ),
                io.Combo.Input("layers", options=LAYERS, tooltip=LAYERS_TOOLTIP),
                io.String.Input(
                    "custom_layers",
                    default=PFB_OBJECT,
                    advanced=True,
                    tooltip="For layers custom: input, middle or output, each with a block number or a range, with "
                    "commas between them; output 3.1 is one of several layers in a block of SDXL. In a transformer "
                    "double or single. A name that the model does not have is answered with those it has.",
                ),
                io.Boolean.Input(
                    "mask_negative",
                    default=True,
                    tooltip="Mask the negative prompt as well, at the same positions, as PFB-Diff does. Leave it on "
                    "without tokens: else guidance pushes the part without text away from that prompt. Off keeps a "
                    "long negative prompt whole.",
                ),
                *inputs.percents(
                    start="When the mask begins to act, as a share of the sampling. 0 for placing words: the first "
                    "steps lay out the picture.",
                    end="When the mask stops acting. 1: the words never leave their region. 0.8 lets the last steps "
                    "blend the border.",
                ),
                sockets.Tokens.Input(
                    "tokens",
                    optional=True,
                    tooltip="The words, from Select Words; connect its positive output to the sampler as well. Without "
                    "them every token is masked, as in the paper: beyond the mask the picture sees no text at all.",
                ),
                io.Boolean.Input(
                    "hide_from_picture",
                    default=True,
                    advanced=True,
                    tooltip="Transformers only (FLUX, Z-Image, Qwen-Image, SD 3, Wan): the picture's own tokens do not "
                    "see the words where they may not act. On (default) is the mask itself; off leaves the next two "
                    "alone.",
                ),
                io.Boolean.Input(
                    "hide_from_text",
                    default=False,
                    advanced=True,
                    tooltip="Transformers only: the prompt's other tokens do not see the words either, and cannot hand "
                    "them on to the rest of the picture. On holds a word tightest; off (default) leaves the sentence "
                    "whole, and part of the word gets through. Not needed on Wan and Anima, whose text hands nothing "
                    "on.",
                ),
                io.Boolean.Input(
                    "hide_from_refiner",
                    default=False,
                    advanced=True,
                    tooltip="Z-Image and Lumina Image 2 only: their first layers mix the words of the prompt before "
                    "the picture sees any. Turn it on with hide_from_text; without it a mask there holds little back.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model in which those words act there only.")],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, mask, tokens=None, **chosen) -> io.NodeOutput:
        settings, remarks = MaskSettings.of(chosen), host.Remarks.of(cls)
        patched = mask_words(model, mask, tokens, settings, remarks)
        return io.NodeOutput(patched, ui=host.told(cls, report(mask, tokens, settings, host.family_of(model)), remarks))


class RegionPhrase(io.ComfyNode):
    """A phrase of its own for one part of the picture."""

    @classmethod
    @inputs.completed("phrase")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestRegionPhrase",
            display_name="Phrase in Region",
            category="palimpsest/regions",
            description="Gives one part of the picture a phrase of its own, beside the prompt. Chain one for each "
            "region: no phrase sees another, and the picture stays one picture.",
            search_aliases=[
                "regional prompt",
                "attention couple",
                "area prompt",
                "prompt per region",
                "mask prompt",
                "inpaint by words",
                "two characters",
                "region",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples. Patches of other nodes stay active."),
                io.Clip.Input("clip", tooltip="The text encoder that the prompt was encoded with."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt for the whole picture, or that of the Phrase in Region before this one. The "
                    "phrase is put behind it.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the phrase is seen: white is yes, black is no, grey in between. Any size; one for "
                    "the whole batch, or one for each picture of it.",
                ),
                io.String.Input(
                    "phrase",
                    multiline=True,
                    default="a red fox",
                    dynamic_prompts=True,
                    tooltip="What is in this part, as a prompt of its own: a subject with all that belongs to it. Of "
                    "the other phrases it knows nothing.",
                ),
                io.Float.Input(
                    "prompt_inside",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the whole picture's prompt this part still sees. 1 (default): all of it, for "
                    "a scene that holds everything together. 0: nothing but the phrase, where the two contradict.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=512.0,
                    step=1.0,
                    tooltip="Softens the mask's edge over this many of its pixels on either side. 0: as painted. 8 "
                    "to 32 hide a seam between two regions.",
                ),
                *inputs.percents(
                    start="When the region begins to hold, as a share of the sampling. 0: the first steps lay out "
                    "the picture. Before it the phrase is seen everywhere.",
                    end="When the region stops to hold. 1: to the end. 0.8 lets the last steps blend the border.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model in which the phrase is seen there only."),
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The prompt with the phrase behind it. Sample with this one, or give it to the next "
                    "Phrase in Region.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, model, clip, positive, mask, **chosen) -> io.NodeOutput:
        settings, remarks = PhraseSettings.of(chosen), host.Remarks.of(cls)
        patched, joined = add_phrase(model, clip, positive, mask, settings, remarks)
        told = phrase_report(mask, settings, joined, host.family_of(model))
        return io.NodeOutput(patched, joined, ui=host.told(cls, told, remarks))


NODES = [CrossAttentionMask, RegionPhrase]
