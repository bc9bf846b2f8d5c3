"""What the tests and the thumbnails put into the shipped workflows: the pocket model's names, pictures, words, values.

`stand_ins(name)` has three tables for one workflow. `settings` is looked at first, then `numbers`, then `strings`.
"""

from __future__ import annotations

import copy

from attention_map.graph import FOUND
from contextdiff.graph import CLIP_EDIT, CLIP_SOURCE
from cross_attention.graph import BOTH, ON_MARBLE
from feature_blend.graph import WHITE_CUP
from instruct_pix2pix.graph import EDIT_CHECKPOINT, INSTRUCTION, ITS_OBJECT
from instruction.graph import VAGUE
from kv.graph import FULL_CUP
from lora_training.graph import ASKED, TAUGHT
from multimodal.graph import REPOSED, SENTENCE, STYLE, SUBJECT
from pocket.settings import POCKET

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

PICTURE, SECOND_PICTURE = "palimpsest_example.png", "palimpsest_example_2.png"
MASKED_PICTURE, PLACE_PICTURE = "palimpsest_example_masked.png", "palimpsest_example_place.png"
RED_CAT, DOG = "a red cat {} on the right in the {}", "a brown dog {} on the left in the {}"
SAVED = "palimpsest_example_00001.safetensors"

STRINGS = {
    CHECKPOINT["name"]: "palimpsest_pocket.safetensors",
    EDIT_CHECKPOINT["name"]: "palimpsest_pocket_edit.safetensors",
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
    FULL_CUP: RED_CAT.format("lying", "snow"),
    CLIP_SOURCE: DOG.format("standing", "park"),
    CLIP_EDIT: "a blue dog standing on the left in the park",
    SENTENCE: "a <image1> cat sitting on the left <image2>",
    STYLE: "a <image1> rabbit standing on the left in the park",
    SUBJECT: "a <image1> cat standing on the right in the snow",
    TAUGHT: "a red cat standing on the right in the snow\na brown dog standing on the left in the snow",
    ASKED: "a blue dog sitting on the left in the park",
    REPOSED: "a <image1> cat lying on the right in the snow",
}
NUMBERS = {
    "steps=30": 20, "steps=200": 60, "validate_every=50": 30, "cfg=7.5": 3.0, "cfg_conds=7.5": 3.0, "guidance=7.5": 3.0,
    "width=1152": 256, "width=576": 128, "height=384": 128, "width=512": 128, "height=512": 128,
}  # fmt: skip
SETTINGS = {f"{node}.{name}": value for node, values in POCKET.items() for name, value in values.items()} | {
    "PalimpsestContextSampler.inversion_refinements": 0,
    "PalimpsestLoadKV.file": SAVED,
    "PalimpsestLoadContextAdapter.file": SAVED,
    "PalimpsestLoadBlendWeights.file": SAVED,
    "PalimpsestLoadMultimodalEncoder.folder": "palimpsest_pocket",
    "PalimpsestLoadMultimodalEncoder.connector": SAVED.replace("example_00001", "pocket"),
    "PalimpsestLoadMGIE.folder": "no folder in models/palimpsest_mgie",
    "PalimpsestExpressInstruction.max_tokens": 24,
    "LoraLoaderModelOnly.lora_name": "palimpsest_pocket_unet.safetensors",
    "PalimpsestBuildMultimodalDataset.min_side": 20,
    "PalimpsestTrainLoRA.resolution": 128,
    "PalimpsestTrainLoRA.epochs": 2,
    "PalimpsestTrainLoRA.repeats": 3,
    "PalimpsestTrainLoRA.preview_every": 1,
    "PalimpsestTrainLoRA.rank": 4,
    "PalimpsestTrainLoRA.checkpointing": False,
    "PalimpsestTrainLoRA.keep_state": "none",
}
TRAINING = {
    "steps": 40, "batch_size": 2, "connector_rate": 0.0003, "tokens": 64, "depth": 2, "warmup": 10, "preview_every": 0,
}  # fmt: skip
SMALL_TRAINING = {"PalimpsestLoadMultimodalEncoder.connector": "none"}
SMALL_TRAINING |= {f"PalimpsestTrainMultimodal.{name}": value for name, value in TRAINING.items()}
DOG_INSTEAD = {CAT: SECOND_PICTURE, AWAKE: DOG.format("standing", "snow"), ASLEEP: DOG.format("sitting", "snow")}
ONLY = {  # what is another in one workflow, by the number in its name: so that no two thumbnails are alike
    "04": {"strings": DOG_INSTEAD},
    "12": {"strings": DOG_INSTEAD},
    "13": {"strings": DOG_INSTEAD},
    "15": {"strings": {COFFEE: SECOND_PICTURE}},
    "16": {"strings": {MASKED_CAT: PLACE_PICTURE}},
    "19": {"settings": SMALL_TRAINING},
}
SHORT = {"steps": 4, "inner_steps": 2}  # in every node that has them, so that a run takes seconds on a CPU


def stand_ins(name: str, short: dict[str, int]) -> dict[str, dict]:
    """The tables for a workflow, and what is set by name alone in the end."""
    only = ONLY.get(name[:2], {})
    tables = {"settings": SETTINGS, "numbers": NUMBERS, "strings": STRINGS}
    return {kind: table | only.get(kind, {}) for kind, table in tables.items()} | {"short": short}


def in_place(name: str, prompt: dict, short: dict[str, int] | None = None) -> dict:
    """A workflow in API format with the pocket's values in the place of its own, and short where that is wanted."""
    tables = stand_ins(name, short or {})
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        inputs |= {i: v for i, v in inputs.items() if isinstance(v, list)} | {
            i: other(tables, kind, i, v) for i, v in inputs.items() if not isinstance(v, list | dict)
        }
        unset = {i.partition(".")[2]: v for i, v in tables["settings"].items() if i.partition(".")[0] == kind}
        inputs |= {i: v for i, v in unset.items() if i not in inputs}
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
