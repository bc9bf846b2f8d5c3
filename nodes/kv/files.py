"""KV embeddings on disk: one .safetensors file in models/palimpsest_kv, one contiguous piece per step."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
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

BLOCKS, JOINT_BLOCKS = ("input", "middle", "output"), ("double", "single")
SIZES = ("height", "width", "channels")
GRIDS = "grids"  # in the header of a transformer's: the layers that learned, with their grids
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

    Of a transformer's, the path and the prompt are written, from which they are recorded again, and what was learned.
    """
    if not isinstance(kv, RecordedKV):
        layers = {"layers": json.dumps([asdict(layer) for layer in kv.layers])}
        header = learned_header(kv) | layers | {"sigmas": json.dumps(kv.sigmas), "layout": kv.layout}
        SHELF.write(path, learned_tensors(kv) | {"noise": kv.noise}, header)
        return
    tensors, header = tensors_of(kv), header_of(kv)
    if kv.learned is not None:
        tensors |= learned_tensors(kv.learned)
        header |= learned_header(kv.learned) | {GRIDS: json.dumps([asdict(layer) for layer in kv.learned.layers])}
    SHELF.write(path, tensors, header)


def learned_tensors(kv: KVEmbeddings) -> dict[str, Tensor]:
    """What was learned, and what is kept of the source, by name."""
    pieces = {
        piece_name(part, i): piece
        for part in (LEARNED, SOURCE)
        for i, piece in enumerate(getattr(kv, part))
        if piece is not None
    }
    return pieces | {"scalars": kv.scalars}


def learned_header(kv: KVEmbeddings) -> dict[str, str]:
    """What is to be known of it, but for its layers."""
    return {
        "span": json.dumps(kv.span),
        "rank": json.dumps([kv.rank, kv.source_rank]),
        "folded": json.dumps(kv.folded),
        "info": json.dumps(kv.info),
    }


def load_kv(path: str) -> KVEmbeddings | RecordedKV:
    """Read embeddings. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    return SHELF.read(path, from_file)


def from_file(header: Header, tensors: Tensors) -> KVEmbeddings | RecordedKV:
    """Embeddings from a file's header and tensors; raises ValueError where one is nonsense or both disagree."""
    if header.get("kind") != KIND:
        kv, known = learned_from(header, tensors, "layers", BLOCKS)
        tensors.refuse_others(known)
        return kv
    if GRIDS not in header:
        return recorded_from(header, tensors)
    of_noise = len(tensors.shapes.get("noise", ())) or 4  # which recorded_from looks at
    learned, known = learned_from(header, tensors, GRIDS, JOINT_BLOCKS, of_noise)
    recorded = recorded_from(header, tensors, known)
    if {layer.key for layer in learned.layers} != set(recorded.layers):
        raise ValueError("the layers that learned are not those that were recorded")
    return replace(recorded, learned=learned)


def learned_from(
    header: Header, tensors: Tensors, key: str, blocks: tuple[str, ...], of_noise: int = 4
) -> tuple[KVEmbeddings, set[str]]:
    """(embeddings, the names of their tensors). key: the header's for their layers, which stand in one of `blocks`.

    of_noise: how many dimensions the noise has.
    """
    sigmas = descending(header.numbers("sigmas"))
    layers = header.records(key, TunedLayer, number=(0, 999), index=(0, 999), **dict.fromkeys(SIZES, (1, 1 << 20)))
    require_layers(layers, blocks)
    steps = len(sigmas) - 1
    first, last = header.numbers("span", int, high=steps, count=2)
    if first > last:
        raise ValueError(f"its span should not end before it begins, it is {first} to {last}")
    ranks = dict(zip((LEARNED, SOURCE), header.numbers("rank", int, high=1 << 16, count=2), strict=True))
    layout, folded, info = header.text("layout"), header.json("folded", bool), header.info(**USED)
    pictures, known = require_shapes(tensors, steps, layers, ranks, of_noise)
    if last > first and len(known) == 2:
        raise ValueError(f"it holds no keys and values of its {pictures} pictures")
    found = {name: tensors[name] for name in sorted(known)}
    require_finite(found)
    kv = KVEmbeddings(
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
    return kv, known


def piece_name(part: str, step: int) -> str:
    """The name of what is kept of one step."""
    return f"{part}.{step:04}"


def descending(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """The noise levels of a schedule. Raises ValueError for fewer than two and for any that rises."""
    if len(sigmas) < 2 or any(level < after for level, after in itertools.pairwise(sigmas)):
        raise ValueError(f"its {len(sigmas)} sigmas should be two or more that fall")
    return sigmas


def require_layers(layers: tuple[TunedLayer, ...], blocks: tuple[str, ...]) -> None:
    """Raise ValueError for no layers, the same one twice, and names of other blocks."""
    if not layers or len({layer.key for layer in layers}) != len(layers):
        raise ValueError(f"its {len(layers)} layers should be one or more, each once")
    odd = sorted({layer.block for layer in layers} - set(blocks))
    if odd:
        raise ValueError(f"its layers name a block {quoted(odd[0])}, there are {', '.join(blocks)}")


def require_shapes(
    tensors: Tensors, steps: int, layers: tuple[TunedLayer, ...], ranks: dict[str, int], of_noise: int
) -> tuple[int, set[str]]:
    """(number of pictures, names of the tensors). Raises ValueError for what the layers and steps do not have."""
    tensors.require("noise", *[None] * of_noise)
    pictures = tensors.shapes["noise"][0]
    tensors.require("scalars", steps, len(layers), len(SCALARS), pictures)
    known = {"noise", "scalars"}
    for part, rank in ranks.items():
        size = MATRICES[part] * sum(layer.elements(rank) for layer in layers)
        pieces = {piece_name(part, i) for i in range(steps)} & tensors.keys()
        for name in sorted(pieces):
            tensors.require(name, pictures, size)
        known |= pieces
    return pictures, known


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
