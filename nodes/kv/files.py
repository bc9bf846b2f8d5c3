"""KV embeddings on disk: one .safetensors file in models/palimpsest_kv, one contiguous piece per step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import Shelf
from .embeddings import LEARNED, MATRICES, SOURCE, KVEmbeddings, TunedLayer

SHELF = Shelf(
    folder="palimpsest_kv",
    format="palimpsest.kv",
    version=2,
    what=("a file of KV embeddings", "Save KV"),
    example="my cat",
    put="kv_embeddings",
    room="tune with a rank, keyframes or fewer layers",
    older="an early version of this pack, before its first release: tune the picture again.",
)
listed, new_path = SHELF.listed, SHELF.new_path


def save(kv: KVEmbeddings, path: Path) -> None:
    """Write embeddings so that the file is whole or not there. Raises OSError with a way out when the disk is full."""
    tensors = {
        f"{part}.{i:04}": piece
        for part in (LEARNED, SOURCE)
        for i, piece in enumerate(getattr(kv, part))
        if piece is not None
    }
    tensors |= {"scalars": kv.scalars, "noise": kv.noise}
    header = {
        "sigmas": json.dumps(kv.sigmas),
        "layers": json.dumps([asdict(layer) for layer in kv.layers]),
        "span": json.dumps(kv.span),
        "rank": json.dumps([kv.rank, kv.source_rank]),
        "folded": json.dumps(kv.folded),
        "layout": kv.layout,
        "info": json.dumps(kv.info),
    }
    SHELF.write(path, tensors, header)


def load(path: str) -> KVEmbeddings:
    """Read embeddings. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> KVEmbeddings:
    """Embeddings from a file's header and tensors; raises KeyError, TypeError or RuntimeError where they disagree."""
    sigmas = tuple(json.loads(header["sigmas"]))
    layers = tuple(TunedLayer(**layer) for layer in json.loads(header["layers"]))
    ranks = dict(zip((LEARNED, SOURCE), json.loads(header["rank"]), strict=True))
    scalars, noise, steps = tensors["scalars"], tensors["noise"], len(sigmas) - 1
    pieces = {part: tuple(tensors.get(f"{part}.{i:04}") for i in range(steps)) for part in ranks}
    if tuple(scalars.shape[:3]) != (steps, len(layers), 4):
        raise RuntimeError(f"its weights {tuple(scalars.shape)} do not fit {steps} steps of {len(layers)} layers")
    for part, found in pieces.items():
        size = MATRICES[part] * sum(layer.elements(ranks[part]) for layer in layers)
        shapes = {tuple(piece.shape) for piece in found if piece is not None}
        if shapes - {(scalars.shape[3], size)}:
            raise RuntimeError(f"its tensors {sorted(shapes)} do not fit its list of {len(layers)} layers")
    if noise.ndim != 4 or len(noise) != scalars.shape[3]:
        raise RuntimeError(f"its noise {tuple(noise.shape)} does not fit {scalars.shape[3]} pictures")
    everything = (scalars, noise, *(t for found in pieces.values() for t in found if t is not None))
    if not all(torch.isfinite(t).all() for t in everything):
        raise RuntimeError("it holds NaN or infinite values")
    return KVEmbeddings(
        sigmas,
        layers,
        tuple(json.loads(header["span"])),
        pieces[LEARNED],
        pieces[SOURCE],
        scalars,
        noise,
        header["layout"],
        *ranks.values(),
        bool(json.loads(header["folded"])),
        json.loads(header.get("info", "{}")),
    )
