"""The workflow of flow-matching models: a photo edited by FlowEdit."""

from __future__ import annotations

from graphs.families import Z_IMAGE, clip_text, decoded, encoded, inverted, loaders
from graphs.parts import (
    BLUE_CUP,
    CUP,
    MASKED_COFFEE,
    WIDE,
    compare,
    graph,
    group,
    load_image,
    note,
    preview,
    save,
)

TITLE = "Edit a photo with a flow model (FlowEdit)"
SOURCE_GUIDANCE, START = 1.5, 0.2
INVERSION_STEPS = 15

START_HERE = """## Edit a photo with a flow model

Z-Image, Qwen-Image, SD 3.5 and FLUX are flow-matching models. **FlowEdit** edits with them without inversion.

1. Load the model, its text encoder and its VAE: of the **base** model, not of Turbo.
2. **Your photo**: right click, *Open in Mask Editor*, paint over what may change. Unpainted,
   nothing changes: disconnect `mask` to free the whole photo.
3. Describe the photo **as it is**, then **as it should be**: name the same things in the same words.
4. Queue. Group 4 makes the same edit from the photo's inverted noise, without a mask; delete it if you do not need it.

Other models: change the three loaders. SD 3.5: no *ModelSamplingAuraFlow*."""

HELP = """## Not right yet?

- **Hardly any change**: *start_percent* 0.1; cfg 6 to 8; longer new prompt.
- **Too much change**: *start_percent* 0.3 to 0.5; cfg 3.
- **Restless colours**: *averages* 2 to 4.
- **FLUX.1 dev**: *source_guidance* 1 and cfg 1, and a *FluxGuidance* on each prompt: 1.5 on the old one, 5.5 on the new
  one.
- **Another seed** gives another edit.

Values to start from; they were not tried on every model."""


def edit_photo() -> dict:
    photo = {
        "image": load_image(MASKED_COFFEE, "Your photo, with a mask"),
        "encode": encoded(),
    }
    prompts = {
        "source": clip_text("The picture as it is", CUP),
        "edit": clip_text("The picture as it should be", BLUE_CUP),
        "negative": clip_text("Negative prompt", ""),
    }
    flow_edit = {
        "type": "PalimpsestFlowEdit", "size": [WIDE, 240],
        "widgets": {"source_guidance": SOURCE_GUIDANCE, "start_percent": START},
        "inputs": {"source": "source.CONDITIONING", "source_negative": "negative.CONDITIONING", "mask": "image.MASK"},
    }  # fmt: skip
    guider = {"type": "CFGGuider", "size": [WIDE, 110], "widgets": {"cfg": Z_IMAGE.cfg},
              "inputs": {"model": "shift.MODEL", "positive": "edit.CONDITIONING",
                         "negative": "negative.CONDITIONING"}}  # fmt: skip
    noise = {"type": "RandomNoise", "size": [WIDE, 90],
             "widgets": {"noise_seed": 0, "control_after_generate": "fixed"}}  # fmt: skip
    sigmas = {"type": "BasicScheduler", "size": [WIDE, 120],
              "widgets": {"scheduler": "simple", "steps": Z_IMAGE.steps, "denoise": 1.0},
              "inputs": {"model": "shift.MODEL"}}  # fmt: skip
    sample = {"type": "SamplerCustomAdvanced", "size": [WIDE, 140],
              "inputs": {"noise": "noise.NOISE", "guider": "guider.GUIDER", "sampler": "flow_edit.sampler",
                         "sigmas": "sigmas.SIGMAS", "latent_image": "encode.LATENT"}}  # fmt: skip
    return graph(
        {"start": note("Start here", START_HERE, 480), "help": note("Not right yet?", HELP, 420)},
        group("1  Model and photo", "yours", loaders(Z_IMAGE), photo),
        group("2  What changes", "edit", {**prompts, "flow_edit": flow_edit}, {
            "guider": guider, "noise": noise, "sigmas": sigmas, "sample": sample,
        }),
        group("3  The edited photo", "edit", {
            "decode": decoded("sample.output"), "save": save(), "compare": compare(),
        }),
        by_inversion(),
    )  # fmt: skip


def by_inversion() -> dict:
    """The same edit from the photo's own noise, for comparison."""
    short = {"type": "BasicScheduler", "size": [WIDE, 120], "title": "Steps of the inversion",
             "widgets": {"scheduler": "simple", "steps": INVERSION_STEPS, "denoise": 1.0},
             "inputs": {"model": "shift.MODEL"}}  # fmt: skip
    invert = inverted("shift.MODEL", "short.SIGMAS", reconstruction_guidance=0.0, flow_method="FireFlow")
    down = {"type": "PalimpsestFlowSampler", "size": [WIDE, 110], "widgets": {"method": "FireFlow"}}
    again = {"type": "SamplerCustomAdvanced", "size": [WIDE, 140],
             "inputs": {"noise": "invert.inverted_noise", "guider": "guider.GUIDER", "sampler": "down.sampler",
                        "sigmas": "short.SIGMAS", "latent_image": "invert.noise"}}  # fmt: skip
    return group(
        "4  To compare: from the photo's own noise",
        "learned",
        {"short": short, "invert": invert},
        {
            "down": down,
            "again": again,
            "decode2": decoded("again.output"),
            "show": preview("From inverted noise", "decode2.IMAGE"),
        },
    )


GRAPHS = {TITLE: edit_photo}
