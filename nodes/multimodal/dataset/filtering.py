"""The inputs of Build Multimodal Dataset that say which pictures it takes, and how often those of people come."""

from __future__ import annotations

from comfy_api.latest import io

SCORES = io.Custom("FLOAT")


def filtering() -> list[io.Input]:
    """At their defaults every picture is taken, and all come as often."""
    return [
        io.Int.Input(
            "min_picture",
            default=0,
            min=0,
            max=8192,
            optional=True,
            advanced=True,
            tooltip="A picture whose shorter side has fewer pixels is left out. 0 (default): none. 512 for SD 1.5, "
            "1024 for SDXL: what those were trained at.",
        ),
        io.Float.Input(
            "max_aspect",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="A picture whose longer side is more times the shorter is left out. 0 (default): none. 2 drops "
            "panoramas and banners.",
        ),
        io.Int.Input(
            "alike_bits",
            default=0,
            min=0,
            max=32,
            optional=True,
            advanced=True,
            tooltip="A picture that is like an earlier one is left out: of the 64 bits of its hash fewer than this "
            "differ. 0 (default): none. 3: photos saved again or resized (0 to 2 bits). 10: drawings that only "
            "resemble each other as well.",
        ),
        io.Float.Input(
            "min_score",
            default=0.0,
            min=-1000.0,
            max=1000.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="A picture with a lower score is left out. 0 (default) takes all that CLIP scores. Its scale is "
            "that of the scores, so look at some first; the paper gives no number for its PickScore.",
        ),
        io.Float.Input(
            "max_text",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="A picture with text or watermarks on more of its area is left out. 1 (default): none. 0.05: a "
            "line of text may stay. The detector finds them, or text_masks say where they are.",
        ),
        io.Int.Input(
            "max_people",
            default=0,
            min=0,
            max=100,
            optional=True,
            advanced=True,
            tooltip="A picture in which more people are found is left out. 0 (default): none. 1 is the paper's, for "
            "photos: in a crowd it is not clear who is meant.",
        ),
        io.Float.Input(
            "people_weight",
            default=1.0,
            min=0.1,
            max=20.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="How often a picture with a crop of a person comes in training, beside one without. 1 (default): "
            "as often. 2 to 4 lean towards people, as the paper does, which blames that for faces without style.",
        ),
        io.Mask.Input(
            "text_masks",
            optional=True,
            tooltip="White where text is in each picture, from any text detector, for max_text, in place of the "
            "detector.",
        ),
        SCORES.Input(
            "scores",
            optional=True,
            extra_dict={"forceInput": True},  # a socket alone: a number typed here would be the score of one picture
            tooltip="A score of each picture, in their order, for min_score, from a node that scores pictures "
            "(PickScore, aesthetics).",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="In place of scores: how well each picture fits its caption, 0 to 100, by this CLIP. With "
            "PickScore's own weights here and in clip it ranks as PickScore does.",
        ),
        io.Clip.Input("clip", optional=True, tooltip="The text half of the same CLIP; needed with clip_vision."),
    ]
