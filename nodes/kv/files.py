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
from ..headers import Header, Tensors
from ..quoting import quoted
from .embeddings import LEARNED, MATRICES, SCALARS, SOURCE, KVEmbeddings, TunedLayer
from .modes import served
from .recorded import RecordedKV
from .recorded_files import KIND, describe_recorded, header_of, recorded_from, tensors_of

BLOCKS, SIZES = ("input", "middle", "output"), ("height", "width", "channels")
USED = {"latent_rmse": float, "pixel_psnr": float}  # of what the tuning wrote about itself, in the report

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


def save_kv(kv: KVEmbeddings | RecordedKV, path: Path) -> None:
    """Write embeddings so that the file is whole or not there. Raises OSError with a way out when that cannot be.

    Of a transformer's, the path and the prompt are written, from which they are recorded again.
    """
    if isinstance(kv, RecordedKV):
        SHELF.write(path, tensors_of(kv), header_of(kv))
        return
    tensors = {
        piece_name(part, i): piece
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


def load_kv(path: str) -> KVEmbeddings | RecordedKV:
    """Read embeddings. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: Header, tensors: Tensors) -> KVEmbeddings | RecordedKV:
    """Embeddings from a file's header and tensors; raises ValueError where one is nonsense or both disagree."""
    if header.get("kind") == KIND:
        return recorded_from(header, tensors)
    sigmas = descending(header.numbers("sigmas"))
    layers = header.records("layers", TunedLayer, number=(0, 999), index=(0, 999), **dict.fromkeys(SIZES, (1, 1 << 20)))
    require_layers(layers)
    steps = len(sigmas) - 1
    first, last = header.numbers("span", int, high=steps, count=2)
    if first > last:
        raise ValueError(f"its span should not end before it begins, it is {first} to {last}")
    ranks = dict(zip((LEARNED, SOURCE), header.numbers("rank", int, high=1 << 16, count=2), strict=True))
    layout, folded, info = header.text("layout"), header.json("folded", bool), header.info(**USED)
    pictures = require_shapes(tensors, steps, layers, ranks)
    if last > first and len(tensors) == 2:
        raise ValueError(f"it holds no keys and values of its {pictures} pictures")
    found = dict(tensors)
    require_finite(found)
    return KVEmbeddings(
        sigmas=sigmas,
        layers=layers,
        span=(first, last),
        learned=tuple(found.get(piece_name(LEARNED, i)) for i in range(steps)),
        source=tuple(found.get(piece_name(SOURCE, i)) for i in range(steps)),
        scalars=found["scalars"],
        noise=found["noise"],
        layout=layout,
        rank=ranks[LEARNED],
        source_rank=ranks[SOURCE],
        folded=folded,
        info=info,
    )


def piece_name(part: str, step: int) -> str:
    """The name of what is kept of one step."""
    return f"{part}.{step:04}"


def descending(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """The noise levels of a schedule. Raises ValueError for fewer than two and for any that rises."""
    if len(sigmas) < 2 or any(level < after for level, after in itertools.pairwise(sigmas)):
        raise ValueError(f"its {len(sigmas)} sigmas should be two or more that fall")
    return sigmas


def require_layers(layers: tuple[TunedLayer, ...]) -> None:
    """Raise ValueError for no layers, the same one twice, and names that no U-Net has."""
    if not layers or len({layer.key for layer in layers}) != len(layers):
        raise ValueError(f"its {len(layers)} layers should be one or more, each once")
    odd = sorted({layer.block for layer in layers} - set(BLOCKS))
    if odd:
        raise ValueError(f"its layers name a block {quoted(odd[0])}, there are {', '.join(BLOCKS)}")


def require_shapes(tensors: Tensors, steps: int, layers: tuple[TunedLayer, ...], ranks: dict[str, int]) -> int:
    """The number of pictures. Raises ValueError for tensors that the header's layers and steps do not have."""
    tensors.require("noise", None, None, None, None)
    pictures = tensors.shapes["noise"][0]
    tensors.require("scalars", steps, len(layers), len(SCALARS), pictures)
    known = {"noise", "scalars"}
    for part, rank in ranks.items():
        size = MATRICES[part] * sum(layer.elements(rank) for layer in layers)
        pieces = {piece_name(part, i) for i in range(steps)} & tensors.keys()
        for name in sorted(pieces):
            tensors.require(name, pictures, size)
        known |= pieces
    tensors.refuse_others(known)
    return pictures


def require_finite(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for NaN and infinite values."""
    odd = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if odd is not None:
        raise ValueError(f"its {odd} holds NaN or infinite values")


def describe_kv(kv: KVEmbeddings | RecordedKV) -> str:
    """One line on what embeddings hold."""
    if isinstance(kv, RecordedKV):
        return describe_recorded(kv)
    _, height, width = kv.latent
    error = f", {inversion.error_in_words(kv.info)}" if "latent_rmse" in kv.info else ""
    rank = f"rank {kv.rank}, " if kv.rank else ""
    return (
        f"{kv.pictures} picture(s) of {width * 8} x {height * 8}, {len(kv.sigmas) - 1} steps, {len(kv.layers)} layers, "
        f"{rank}{kv.bytes / 1e6:.1f} MB{error}; modes {', '.join(served(kv))}"
    )
