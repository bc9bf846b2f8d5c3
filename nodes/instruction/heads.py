"""Edit heads trained here: files of models/palimpsest_edit_heads, which Load MGIE puts on a language model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.edit_head import EditMapper
from ..files import Shelf
from ..headers import Header, Tensors
from .edit_head import EMBEDDINGS, PREFIX, EditHead, head_of
from .llava import MgieModel
from .rows import ImageRows

OF_FOLDER = "(the folder's own)"
HEADS = Shelf(
    folder="palimpsest_edit_heads",
    format="palimpsest.edit_head",
    version=1,
    what=("an edit head", "Train Instruction"),
    example="my edits",
    put="edit_heads",
    room="clear the temporary files",
)


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """An edit head with the embeddings (8, D) of [IMG0..7] that it adds; rows: where those tokens learned too."""

    network: EditMapper
    embeddings: Tensor
    rows: ImageRows | None = None

    def on(self, head: EditHead, name: str) -> EditHead:
        """An EDIT_HEAD of this head and another's language model, which is shared and stays as it is."""
        model = head.model if self.rows is None or head.model is None else Relearned(head.model, self.rows)
        return EditHead(name, self.network, self.embeddings, model)


@dataclass(frozen=True, eq=False)
class Relearned:
    """A language model of another socket, with learned rows of [IMG0..7]."""

    base: Any
    rows: ImageRows

    def loaded(self) -> MgieModel:
        """The model."""
        return replace(self.base.loaded(), rows=self.rows)


def content(
    network: EditMapper, embeddings: Tensor, rows: ImageRows | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a file, in half precision and by the published file's names."""
    found = {f"{PREFIX}{name}": tensor for name, tensor in network.state_dict().items()}
    found |= {EMBEDDINGS: embeddings} | ({} if rows is None else rows.tensors())
    return {name: tensor.detach().cpu().half().clone() for name, tensor in found.items()}, {
        "heads": json.dumps([network.config.heads])
    }


def from_content(tensors: dict[str, Tensor], heads: int, name: str) -> TrainedHead:
    """What a file's tensors are. Raises ValueError for those that make no edit head."""
    with torch.inference_mode(False):
        network, embeddings = head_of(tensors, heads, name)
        rows = ImageRows.of(tensors, network.config.hidden, name)
    return TrainedHead(network, embeddings, rows)


def load(file: str) -> TrainedHead:
    """A file by its listed name. Raises ValueError for a foreign, newer, cut-off or damaged one."""

    def build(header: Header, tensors: Tensors) -> TrainedHead:
        (heads,) = header.numbers("heads", int, low=1, high=64, count=1)
        return from_content(dict(tensors), heads, file)

    return HEADS.read(HEADS.path(file), build)
