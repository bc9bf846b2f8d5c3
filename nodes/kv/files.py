"""KV embeddings on disk: one .safetensors file in models/palimpsest_kv, one contiguous piece per step."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .. import inversion
from ..files import Shelf
from .embeddings import LEARNED, MATRICES, SOURCE, KVEmbeddings, TunedLayer
from .modes import served

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


def save_kv(kv: KVEmbeddings, path: Path) -> None:
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


def load_kv(path: str) -> KVEmbeddings:
    """Read embeddings. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: dict[str, str], tensors: dict[str, Tensor]) -> KVEmbeddings:
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
        require_pieces(found, (scalars.shape[3], size), len(layers))
    if noise.ndim != 4 or len(noise) != scalars.shape[3]:
        raise RuntimeError(f"its noise {tuple(noise.shape)} does not fit {scalars.shape[3]} pictures")
    require_finite([scalars, noise, *itertools.chain(*pieces.values())])
    return KVEmbeddings(
        sigmas=sigmas,
        layers=layers,
        span=tuple(json.loads(header["span"])),
        learned=pieces[LEARNED],
        source=pieces[SOURCE],
        scalars=scalars,
        noise=noise,
        layout=header["layout"],
        rank=ranks[LEARNED],
        source_rank=ranks[SOURCE],
        folded=bool(json.loads(header["folded"])),
        info=json.loads(header.get("info", "{}")),
    )


def require_pieces(pieces: tuple[Tensor | None, ...], shape: tuple[int, int], layers: int) -> None:
    """Raise RuntimeError for a step's piece of another shape."""
    shapes = {tuple(piece.shape) for piece in pieces if piece is not None}
    if shapes - {shape}:
        raise RuntimeError(f"its tensors {sorted(shapes)} do not fit its list of {layers} layers")


def require_finite(tensors: list[Tensor | None]) -> None:
    """Raise RuntimeError for NaN and infinite values."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor is not None):
        raise RuntimeError("it holds NaN or infinite values")


def describe_kv(kv: KVEmbeddings) -> str:
    """One line on what embeddings hold."""
    _, height, width = kv.latent
    error = f", {inversion.error_in_words(kv.info)}" if "latent_rmse" in kv.info else ""
    rank = f"rank {kv.rank}, " if kv.rank else ""
    return (
        f"{kv.pictures} picture(s) of {width * 8} x {height * 8}, {len(kv.sigmas) - 1} steps, {len(kv.layers)} layers, "
        f"{rank}{kv.bytes / 1e6:.1f} MB{error}; modes {', '.join(served(kv))}"
    )
