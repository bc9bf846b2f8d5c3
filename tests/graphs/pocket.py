"""What the tests and the thumbnails put into the shipped workflows: the pocket model's names, pictures, words, values.

`stand_ins(name)` has three tables for one workflow. `settings` is looked at first, then `numbers`, then `strings`.
"""

from __future__ import annotations

import copy

from attention_map.graph import FOUND
from contextdiff.graph import CLIP_EDIT, CLIP_SOURCE
from cross_attention.flow_graph import (
    CUP_AND_BOOK,
    IN_A_CAFE,
    IN_A_FOREST,
    IN_A_GARDEN,
    ON_A_CLIFF,
    TEAPOT_AND_LEMONS,
)
from cross_attention.graph import BOTH, ON_MARBLE
from feature_blend.flow_graph import JUICE
from feature_blend.graph import WHITE_CUP
from instruct_pix2pix.graph import EDIT_CHECKPOINT, INSTRUCTION, ITS_OBJECT
from instruction.graph import VAGUE
from instruction_training.graph import LEARNED
from kv.graph import FULL_CUP
from lora_training.graph import ASKED, STYLED, TAUGHT
from lora_training.graph import STYLE as LORA_STYLE
from multimodal.graph import CONTENTS, REPOSED, SENTENCE, STYLE, STYLES, SUBJECT
from pocket.flow_files import FILES
from pocket.settings import POCKET
from pose_control.graph import CONTROL, POSE, SITTING_UPRIGHT, UPRIGHT
from text_control.graph import UNWANTED, WANTED, WANTED_STYLED, WANTED_THERE
from what_changes.graph import ELSEWHERE
from what_changes.graph import SUBJECT as FOUND_SUBJECT

from graphs.families import (
    ANIMA,
    FLUX_1,
    FLUX_2_KLEIN,
    QWEN_IMAGE,
    SD_35,
    WAN_VIDEO,
    Z_IMAGE,
    Z_IMAGE_TURBO,
    Family,
    files_of,
    published,
)
from graphs.parts import (
    ACTIONS,
    ANY_ACTION,
    ASLEEP,
    AWAKE,
    BLUE_CUP,
    CAT,
    CHECKPOINT,
    CLIP,
    COFFEE,
    CUP,
    MASKED_CAT,
    MASKED_COFFEE,
    YAWNING,
)
from graphs.titles import title_of

PICTURE, SECOND_PICTURE = "palimpsest_example.png", "palimpsest_example_2.png"
POSE_PICTURE = "palimpsest_example_pose.png"
MASKED_PICTURE, PLACE_PICTURE = "palimpsest_example_masked.png", "palimpsest_example_place.png"
RED_CAT, DOG = "a red cat {} on the right in the {}", "a brown dog {} on the left in the {}"
SAVED = "palimpsest_example_00001.safetensors"

STRINGS = {
    CHECKPOINT["name"]: "palimpsest_pocket.safetensors",
    EDIT_CHECKPOINT["name"]: "palimpsest_pocket_edit.safetensors",
    published(SD_35, "checkpoints")["name"]: "palimpsest_pocket.safetensors",
    **{model["name"]: FILES[model["directory"]] for model in files_of(Z_IMAGE)},
    CAT: PICTURE,
    COFFEE: PICTURE,
    MASKED_CAT: MASKED_PICTURE,
    MASKED_COFFEE: MASKED_PICTURE,
    CLIP: "palimpsest_walk.webp",
    AWAKE: RED_CAT.format("standing", "snow"),
    ASLEEP: RED_CAT.format("sitting", "snow"),
    YAWNING: RED_CAT.format("lying", "snow"),
    ANY_ACTION: "a red cat {} on the right in the snow",
    ACTIONS: "sitting\nlying\nrunning\njumping",
    CUP: RED_CAT.format("standing", "snow"),
    BLUE_CUP: "a blue cat standing on the right in the snow",
    WHITE_CUP: "a yellow cat standing on the right in the snow",
    ON_MARBLE: RED_CAT.format("standing", "park"),
    BOTH: "a blue cat standing on the right in the park",
    FOUND: "red cat",
    "marble": "park",
    INSTRUCTION: "a blue cat standing on the right in the snow",
    ITS_OBJECT: "cat",
    VAGUE: "lying",
    JUICE: "a black cat standing on the right in the snow",
    CUP_AND_BOOK.prompt: "a red cat standing on the left in the park",
    CUP_AND_BOOK.left: "red cat",
    CUP_AND_BOOK.right: "park",
    TEAPOT_AND_LEMONS.prompt: "a yellow rabbit standing on the left at night",
    TEAPOT_AND_LEMONS.left: "yellow rabbit",
    TEAPOT_AND_LEMONS.right: "night",
    IN_A_CAFE.scene: "in the room",
    IN_A_CAFE.left: "a red cat sitting on the left in the room",
    IN_A_CAFE.right: "a blue cat sitting on the right in the room",
    IN_A_GARDEN.scene: "on the beach",
    IN_A_GARDEN.left: "a yellow bird standing on the left on the beach",
    IN_A_GARDEN.right: "a white rabbit sitting on the right on the beach",
    ON_A_CLIFF.scene: "in the snow",
    ON_A_CLIFF.left: "a black cat sitting on the left in the snow",
    ON_A_CLIFF.right: "a brown dog standing on the right in the snow",
    IN_A_FOREST.scene: "at night",
    IN_A_FOREST.left: "a brown dog running on the left at night",
    IN_A_FOREST.right: "a white rabbit sitting on the right at night",
    ANIMA.negative: "",
    WAN_VIDEO.negative: "",
    FULL_CUP: RED_CAT.format("lying", "snow"),
    CLIP_SOURCE: DOG.format("standing", "park"),
    CLIP_EDIT: "a blue dog standing on the left in the park",
    SENTENCE: "a <image1> cat sitting on the left <image2>",
    STYLE: "a <image1> rabbit standing on the left in the park",
    SUBJECT: "a <image1> cat standing on the right in the snow",
    TAUGHT: "a red cat standing on the right in the snow\na brown dog standing on the left in the snow",
    ASKED: "a blue dog sitting on the left in the park",
    LEARNED: "a red cat standing on the left in the room",
    STYLED: RED_CAT.format("sitting", "snow"),
    LORA_STYLE: "snow",
    ELSEWHERE: RED_CAT.format("standing", "park"),
    FOUND_SUBJECT: "red cat",
    CONTENTS: "a red [cat] standing on the right\na brown [dog] sitting on the left",
    STYLES: "in the snow\nat night\nin the park",
    REPOSED: "a <image1> cat lying on the right in the snow",
    WANTED: RED_CAT.format("standing", "snow") + ' with a sign that says "RED CAT"',
    WANTED_THERE: RED_CAT.format("standing", "park") + ' with a sign that says "RED CAT"',
    WANTED_STYLED: RED_CAT.format("sitting", "park") + ' with a sign that says "RED CAT"',
    UNWANTED: "",
    CONTROL["name"]: "palimpsest_pocket_pose.safetensors",
    POSE: POSE_PICTURE,
    UPRIGHT: RED_CAT.format("standing", "snow"),
    SITTING_UPRIGHT: RED_CAT.format("running", "snow"),
}
NUMBERS = {
    "steps=30": 20, "steps=200": 60, "validate_every=50": 30, "cfg=7.5": 3.0, "cfg_conds=7.5": 3.0, "guidance=7.5": 3.0,
    "width=1152": 256, "width=576": 128, "height=384": 128, "width=512": 128, "height=512": 128,
}  # fmt: skip
SETTINGS = {f"{node}.{name}": value for node, values in POCKET.items() for name, value in values.items()} | {
    "PalimpsestContextSampler.inversion_refinements": 0,
    "PalimpsestInvert.context_refinements": 2,
    "ImageScaleToTotalPixels.megapixels": 128 * 128 / 1024**2,
    "PalimpsestLoadKV.file": SAVED,
    "PalimpsestLoadContextAdapter.file": SAVED,
    "PalimpsestLoadBlendWeights.file": SAVED,
    "PalimpsestLoadMultimodalEncoder.folder": "palimpsest_pocket",
    "PalimpsestLoadMultimodalEncoder.connector": SAVED.replace("example_00001", "pocket"),
    "PalimpsestLoadMGIE.folder": "no folder in models/palimpsest_mgie",
    "PalimpsestExpressInstruction.max_tokens": 24,
    "CLIPLoader.type": "stable_diffusion",
    "LoraLoaderModelOnly.lora_name": "palimpsest_pocket_unet.safetensors",
    "LoraLoader.lora_name": "palimpsest_pocket_unet.safetensors",
    "PalimpsestBuildMultimodalDataset.min_side": 20,
    "PalimpsestTrainLoRA.resolution": 128,
    "PalimpsestTrainLoRA.epochs": 2,
    "PalimpsestTrainLoRA.repeats": 3,
    "PalimpsestTrainLoRA.preview_every": 1,
    "PalimpsestTrainLoRA.rank": 4,
    "PalimpsestTrainLoRA.checkpointing": False,
    "PalimpsestTrainLoRA.keep_state": "none",
    "PalimpsestTextLines.lines": "RED CAT",
    "PalimpsestTrainInstruction.resolution": 128,
    "PalimpsestTrainInstruction.steps": 12,
    "PalimpsestTrainInstruction.preview_every": 6,
    "PalimpsestTrainInstruction.rank": 4,
    "PalimpsestTrainInstruction.learning_rate": 0.002,
    "PalimpsestTrainInstruction.accumulation": 1,
    "PalimpsestTrainInstruction.checkpointing": False,
    "PalimpsestTrainInstruction.keep_state": "none",
    "PalimpsestTrainInstruction.keep_widened": False,
    "PalimpsestLoadAnyText.file": "palimpsest_pocket.safetensors",
    "PalimpsestTrainTextControl.folder": "palimpsest_pocket",
    "PalimpsestTrainTextControl.resolution": 128,
    "PalimpsestTrainTextControl.batch_size": 1,
    "PalimpsestTrainTextControl.accumulation": 1,
    "PalimpsestTrainTextControl.preview_every": 4,
    "PalimpsestTrainTextControl.checkpointing": False,
    "PalimpsestTrainTextControl.keep_state": "none",
}
TRAINING = {
    "steps": 30, "preset": "as set above", "align_steps": 40, "align_rate": 0.001, "batch_size": 2,
    "connector_rate": 0.0003, "tokens": 64, "depth": 2, "warmup": 10, "preview_every": 0,
}  # fmt: skip
SMALL_TRAINING = {"PalimpsestLoadMultimodalEncoder.connector": "none"}
SMALL_TRAINING |= {f"PalimpsestTrainMultimodal.{name}": value for name, value in TRAINING.items()}
DOG_INSTEAD = {CAT: SECOND_PICTURE, AWAKE: DOG.format("standing", "snow"), ASLEEP: DOG.format("sitting", "snow")}


def small(family: Family, *, wide: bool = False) -> dict[str, float]:
    """Numbers of a template of a family, for the pocket model; wide: halves as large as one picture, two such."""
    return ({"batch_size=1": 2} if wide else {}) | {
        f"width={family.width}": 256 if wide else 128,
        f"height={family.height}": 128,
        f"width={family.width // 2}": 128 if wide else 64,
        f"cfg={family.cfg:g}": 3.0,
        f"steps={family.steps}": 20,
    }


# Loaders of a transformer's files, and what only such a model has: the node in its place, the output that is meant
# there, and its values. The nodes of this pack in the same graph serve both kinds of models.
OF_OTHER_KINDS = {  # drawn with the pocket checkpoint, whose nodes are others than a transformer's
    "Words in regions on Z-Image (Cross-Attention Mask)": Z_IMAGE_TURBO,
    "Words in regions on Qwen-Image (Cross-Attention Mask)": QWEN_IMAGE,
    "A phrase for each region on FLUX (Phrase in Region)": FLUX_1,
    "A phrase for each region on FLUX.2 Klein (Phrase in Region)": FLUX_2_KLEIN,
    "Two characters, each in its half, on Anima (Phrase in Region)": ANIMA,
    "Two phrases in a clip on Wan (Phrase in Region)": WAN_VIDEO,
    "Re-pose a subject on a flow model (KV Inversion)": Z_IMAGE,
    "Edit again from a file on a flow model (KV Inversion)": Z_IMAGE,
}
OTHER_KINDS = {
    **{kind: ("CheckpointLoaderSimple", slot, {"ckpt_name": STRINGS[CHECKPOINT["name"]]}) for kind, slot in (
        ("UNETLoader", 0), ("CLIPLoader", 1), ("DualCLIPLoader", 1), ("VAELoader", 2))},
    "EmptySD3LatentImage": ("EmptyLatentImage", 0, None),
    "EmptyFlux2LatentImage": ("EmptyLatentImage", 0, None),
    "EmptyHunyuanLatentVideo": ("EmptyLatentImage", 0, {"width": 256, "height": 128, "batch_size": 4}),
    "Flux2Scheduler": ("KarrasScheduler", 0, {"steps": 20, "sigma_max": 14.61, "sigma_min": 0.03, "rho": 7.0}),
    "ModelSamplingAuraFlow": ("ModelSamplingDiscrete", 0, {"sampling": "eps", "zsnr": False}),
    "ModelSamplingSD3": ("ModelSamplingDiscrete", 0, {"sampling": "eps", "zsnr": False}),
}  # fmt: skip
ONLY = {  # what is another in one workflow, by its title: so that no two thumbnails are alike
    "Two photos in one picture (KV Inversion)": {"strings": DOG_INSTEAD},
    "Align a picture with its prompt (Context)": {"strings": DOG_INSTEAD},
    "Draw with a saved context adapter (Context)": {"strings": DOG_INSTEAD},
    "Teach a style with your pictures (LoRA)": {"strings": {COFFEE: SECOND_PICTURE}},
    "Your own instruction model (Train Instruction)": {"strings": {COFFEE: SECOND_PICTURE}},
    "Two pictures in a sentence (Multimodal)": {"strings": {MASKED_CAT: PLACE_PICTURE}},
    "Train a connector on your own pictures (Multimodal)": {"settings": SMALL_TRAINING},
    "Edit a clip by text, with context (ContextDiff)": {
        "strings": {CLIP_EDIT: "a red dog standing on the left in the park"}
    },
    **{title: {"numbers": small(family, wide="Phrase" in title)} for title, family in OF_OTHER_KINDS.items()},
    "Edit a photo, its place kept, on SD 3.5 (Feature Blend)": {"numbers": {"cfg=4": 3.0}},
    "Edit again from a file on a flow model (KV Inversion)": {
        "numbers": small(Z_IMAGE),
        "settings": {"BasicScheduler.scheduler": "normal"},  # of the file, which the first template writes
        "strings": {YAWNING: "a red cat lying on the left in the snow"},
    },
    "Re-pose a subject on a flow model (KV Inversion)": {
        "numbers": small(Z_IMAGE),
        "strings": {ASLEEP: RED_CAT.format("running", "snow")},
    },
}
# In every node that has them, so that a run takes seconds on a CPU.
SHORT = {"steps": 4, "inner_steps": 2, "epochs": 1, "repeats": 1, "resolution": 64, "align_steps": 4}
SHORT_STRINGS = {CLIP: "palimpsest_walk_short.webp"}


def stand_ins(name: str, short: dict[str, int]) -> dict[str, dict]:
    """The tables for a workflow, and what is set by name alone in the end."""
    only = ONLY.get(title_of(name), {})
    tables = {"settings": SETTINGS, "numbers": NUMBERS, "strings": STRINGS | (SHORT_STRINGS if short else {})}
    return {kind: table | only.get(kind, {}) for kind, table in tables.items()} | {"short": short}


def in_place(name: str, prompt: dict, short: dict[str, int] | None = None) -> dict:
    """A workflow in API format with the pocket's values in the place of its own, and short where that is wanted."""
    tables = stand_ins(name, short or {})
    prompt = copy.deepcopy(prompt)
    if title_of(name) in OF_OTHER_KINDS:
        prompt = other_kinds(prompt)
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        inputs |= {i: v for i, v in inputs.items() if isinstance(v, list)} | {
            i: other(tables, kind, i, v) for i, v in inputs.items() if not isinstance(v, list | dict)
        }
        unset = {i.partition(".")[2]: v for i, v in tables["settings"].items() if i.partition(".")[0] == kind}
        inputs |= {i: v for i, v in unset.items() if i not in inputs}
    return prompt


def other_kinds(prompt: dict) -> dict:
    """A graph with the pocket's loader in the place of a transformer's."""
    slots = {}
    for key, node in prompt.items():
        if node["class_type"] in OTHER_KINDS:
            node["class_type"], slots[key], values = OTHER_KINDS[node["class_type"]]
            linked = {i: v for i, v in node["inputs"].items() if isinstance(v, list)}
            node["inputs"] = node["inputs"] if values is None else linked | values
    for node in prompt.values():
        node["inputs"] |= {
            i: [v[0], slots[v[0]]] for i, v in node["inputs"].items() if isinstance(v, list) and v[0] in slots
        }
    return prompt


def other(tables: dict[str, dict], kind: str, name: str, value):
    """What stands in the place of a value of a node's input."""
    if name in tables["short"]:
        return tables["short"][name]
    for table, key in (("settings", f"{kind}.{name}"), ("numbers", f"{name}={value:g}" if number(value) else "")):
        if key in tables[table]:
            return tables[table][key]
    return tables["strings"].get(value, value) if isinstance(value, str) else value


def number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
