"""The workflows of KV Inversion on flow-matching models: noise travels as NOISE, keys and values are recorded."""

from __future__ import annotations

from graphs.families import Z_IMAGE, both_ways, clip_text, decoded, encoded, guided_sampling, inverted, loaders
from graphs.parts import ASLEEP, AWAKE, CAT, WIDE, YAWNING, compare, graph, group, load_image, note, preview, save

FILE = "palimpsest_flow_example"  # Save KV adds _00001.safetensors
AGAIN = "Edit again from a file on a flow model (KV Inversion)"
REPOSE = "Re-pose a subject on a flow model (KV Inversion)"

START_HERE = """## Change what a subject does, on a flow model

Z-Image, Qwen-Image, FLUX, Chroma and SD 3.5: their attention sees text and picture in one sequence. **Tune KV**
records there what the photo's own tokens show (inner_steps 0), and the edit looks at it.

1. The loaders: the **base** model, its text encoder, its VAE. Not Turbo, which does not invert well.
2. **Your photo**, about 1024 px, and what it shows.
3. **The picture as it should be**: the same words with another action.
4. Queue. As long as you change only group 3, later runs only sample.

Save KV writes the photo's way to noise to models/palimpsest_kv; the template *Edit again from a file on a flow
model* takes it from there.

Other models: change the three loaders. FLUX, SD 3.5: no *ModelSamplingAuraFlow*."""

START_AGAIN = """## Edit a photo again on a flow model

**No file yet?** Run the template *Re-pose a subject on a flow model* once: it writes it. Then press R here.

1. The loaders: the model the photo was inverted with.
2. **Load KV**: the file that Save KV wrote (models/palimpsest_kv). The model is connected to it for *inverted_noise*: a
   flow model multiplies a latent by 0 where it begins, so that noise has a socket of its own.
3. **The picture as it should be**: any new action.
4. Queue. Apply KV records the photo again, a model call a step, for the file holds its way and its prompt, not
   gigabytes of keys and values. As long as you change only prompts, later runs only sample.

Keep steps, scheduler and shift as they were when you inverted."""

HELP = """## Not right yet?

- **The picture, redrawn, is off** (in the template that records it): a prompt that fits better; more steps.
- **Wrong pose**: *start_percent* (Apply KV) 0.2 to 0.4, *strength* 0.5 to 0.8.
- **Coat or face missing**: *layers* all (Tune KV and Apply KV); *source_guidance* 2 to 4.
- **The old surroundings come along**: *source_mask* (Apply KV), white over the subject in the photo.
- **Closest to the photo**: *mode* frozen.
- **FLUX.1 dev**: cfg 1, and a *FluxGuidance* of 1 on the old prompt, 3.5 on the new one.

Values to start from; they were not tried on published weights.

## Memory

A step of Z-Image at 1024 px takes 629 MB with *layers* decoder, of FLUX.1 956 MB, of Qwen-Image 1,007 MB. What a
quarter of the free memory holds is recorded once; else the photo has a pass beside every step. Tune KV's report says
which."""


def apply(kv: str) -> dict:
    return {"type": "PalimpsestApplyKV", "size": [WIDE, 290], "widgets": {"source_guidance": 1.0},
            "inputs": {"model": "shift.MODEL", "kv": kv}}  # fmt: skip


def sampled(noise: str, latent: str) -> dict[str, dict]:
    """From noise that was found."""
    return guided_sampling("apply.MODEL", "edit.CONDITIONING", Z_IMAGE.cfg, noise, latent)


def repose() -> dict:
    tune = {
        "type": "PalimpsestTuneKV", "size": [WIDE, 520], "widgets": {"inner_steps": 0},
        "inputs": {"model": "shift.MODEL", "trajectory": "invert.trajectory", "positive": "source.CONDITIONING",
                   "negative": "negative.CONDITIONING"},
    }  # fmt: skip
    return graph(
        {"start": note("Start here", START_HERE, 420), "help": note("Not right yet?", HELP, 560)},
        group(
            "1  Model and photo",
            "yours",
            loaders(Z_IMAGE),
            {
                "image": load_image(CAT),
                "encode": encoded(),
                "source": clip_text("The picture as it is", AWAKE),
                "negative": clip_text("Negative prompt", ""),
            },
        ),
        group(
            "2  Record it",
            "learned",
            {"sigmas": both_ways("shift.MODEL", Z_IMAGE.steps), "invert": inverted("shift.MODEL")},
            {
                "tune": tune,
                "rebuilt": decoded("invert.reconstruction"),
                "look": preview("The picture, redrawn", "rebuilt.IMAGE", 300),
                "keep": {"type": "PalimpsestSaveKV", "size": [WIDE, 60],
                         "widgets": {"filename": FILE}, "inputs": {"kv": "tune.kv"}},
            },
        ),
        group(
            "3  Edit it",
            "edit",
            {"edit": clip_text("The picture as it should be", ASLEEP), "apply": apply("tune.kv")},
            sampled("invert.inverted_noise", "invert.noise"),
            {"decode": decoded("sample.output"), "save": save(), "compare": compare()},
        ),
    )  # fmt: skip


def again() -> dict:
    load = {"type": "PalimpsestLoadKV", "size": [WIDE, 140], "unset": ["file"], "inputs": {"model": "shift.MODEL"}}
    return graph(
        {"start": note("Start here", START_AGAIN, 440), "help": note("Not right yet?", HELP, 560)},
        group(
            "1  The model, and what was recorded",
            "learned",
            loaders(Z_IMAGE),
            {
                "load": load,
                "negative": clip_text("Negative prompt", ""),
                "image": load_image(CAT, "The photo, to compare with"),
            },
        ),
        group(
            "2  Edit it",
            "edit",
            {
                "edit": clip_text("The picture as it should be", YAWNING),
                "apply": apply("load.kv"),
                "sigmas": both_ways("shift.MODEL", Z_IMAGE.steps),
            },
            sampled("load.inverted_noise", "load.noise"),
            {"decode": decoded("sample.output"), "save": save(), "compare": compare()},
        ),
    )


GRAPHS = {REPOSE: repose, AGAIN: again}
