"""MGIE's edit head of the pocket world, trained by Train Instruction on its triples, for minutes of one core.

The language model and the U-Net stay as they are (method: edit head alone; image_tokens off, so that the states are
read once). Most steps learn to say what the text encoder says of the expressed text, the last go through the U-Net.
"""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.scenes import defaults
from instruction_training import pocket_triples
from palimpsest.kernels.edit_head import EditMapper
from palimpsest.nodes.instruction.heads import HEADS
from palimpsest.nodes.instruction_training.files import STATES
from palimpsest.nodes.instruction_training.nodes import TrainInstruction
from palimpsest.nodes.instruction_training.settings import HEAD_ALONE
from pocket import world
from torch import Tensor

NAME = "edit_head.safetensors"
LISTS = ("pictures", "results", "instructions", "expressed", "masks")
RECIPE = {
    "method": HEAD_ALONE, "steps": 2600, "text_steps": 2400, "batch_size": 8, "accumulation": 1, "resolution": 128,
    "head_width": 192, "head_layers": 2, "head_rate": 1e-3, "warm_up": 50, "image_tokens": False, "min_snr_gamma": 5.0,
    "save_every": 400, "preview_every": 0, "keep_state": "with every file", "checkpointing": False,
}  # fmt: skip


def rendered(scenes: list[world.Scene]) -> Tensor:
    """IMAGE (B, H, W, 3)."""
    return torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).float() / 255


def train(work: Path, models: tuple[Any, Any, Any], head: Any, count: int, **changes: Any) -> str:
    """Train on `count` triples and put the head beside the language model in `work`; goes on with the last state.

    Returns the node's report.
    """
    import folder_paths

    for shelf in (HEADS, STATES):
        folder_paths.add_model_folder_path(shelf.folder, str(work / "head" / shelf.folder), is_default=True)
        (work / "head" / shelf.folder).mkdir(parents=True, exist_ok=True)
    triples = [pocket_triples.triple(index) for index in range(count)]
    model, clip, vae = models
    chosen = defaults(TrainInstruction) | RECIPE | changes | {"model": model, "clip": clip, "vae": vae}
    chosen |= {
        "edit_head": head,
        "pictures": list(rendered([each.source for each in triples]).split(1)),
        "results": list(rendered([each.edited for each in triples]).split(1)),
        "instructions": [each.instruction for each in triples],
        "expressed": [each.expressed for each in triples],
    }
    states = sorted(STATES.root.glob("*.safetensors"), key=os.path.getmtime)
    if states:
        chosen["resume"] = STATES.name(states[-1])
    chosen = {name: value if name in LISTS else [value] for name, value in chosen.items() if value is not None}
    *_, report, file, _ = TrainInstruction.execute(**chosen).args
    shutil.copy(HEADS.path(file), work / NAME)
    return report


# --------------------------------------------------------------------------------------------------------- made smaller


@torch.no_grad()
def narrowed(network: EditMapper, states: Tensor, embeddings: Tensor, units: int) -> EditMapper:
    """The head with feed-forwards of fewer units: those that do most on these states, the rest refitted into them.

    Layer by layer W2' = argmin |H W2^T - H' W2'^T|^2, H' being the kept units' activations. states (B, 8, D).
    """
    small = EditMapper(replace(network.config, feed_forward=units), torch.nn).eval()
    wide = copy.deepcopy(network).eval()
    kept = {}
    for half in ("encoder", "decoder"):
        for number, layer in enumerate(getattr(wide.mapper, half).layers):
            rows = []
            hook = layer.linear2.register_forward_pre_hook(lambda _, given, rows=rows: rows.append(given[0]))
            wide(states, embeddings)
            hook.remove()
            active = rows[0].flatten(0, 1).double()
            size = active.square().mean(0) * layer.linear2.weight.square().sum(0)
            best = size.argsort(descending=True)[:units].sort().values
            ones = torch.ones(len(active), 1, dtype=torch.float64)
            seen = torch.cat([active[:, best], ones], 1)
            old = torch.cat([layer.linear2.weight[:, best], layer.linear2.bias[:, None]], 1).double()
            missing = active @ layer.linear2.weight.T.double() + layer.linear2.bias - seen @ old.T
            square = seen.T @ seen
            floor = 1e-4 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
            new = (old + torch.linalg.solve(square + floor, seen.T @ missing).T).float()
            gone = torch.ones(len(size), dtype=torch.bool)
            gone[best] = False
            layer.linear2.weight[:, gone] = 0
            layer.linear2.weight[:, best], layer.linear2.bias[:] = new[:, :-1], new[:, -1]
            kept[f"mapper.{half}.layers.{number}"] = best
    state = wide.state_dict()
    for name, best in kept.items():
        for key in ("linear1.weight", "linear1.bias"):
            state[f"{name}.{key}"] = state[f"{name}.{key}"][best]
        state[f"{name}.linear2.weight"] = state[f"{name}.linear2.weight"][:, best]
    small.load_state_dict(state)
    return small
