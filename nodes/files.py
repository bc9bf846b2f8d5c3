"""KV embeddings on disk: one .safetensors file in models/palimpsest_kv, one contiguous piece per step."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .patches.artefacts import LEARNED, MATRICES, SOURCE, KVEmbeddings, TunedLayer

FOLDER = "palimpsest_kv"
FORMAT = "palimpsest.kv"
VERSION = 2


def register_folder() -> None:
    """Tell the host about models/palimpsest_kv; only .safetensors files of it are ever listed."""
    import folder_paths

    path = os.path.join(folder_paths.models_dir, FOLDER)
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folder_paths.folder_names_and_paths[FOLDER] = (
        [*paths, *([] if path in paths else [path])],
        extensions | {".safetensors"},
    )


def listed() -> list[str]:
    """Names of the saved embeddings, as the loader offers them."""
    import folder_paths

    return folder_paths.get_filename_list(FOLDER)


def new_path(prefix: str) -> Path:
    """The first free `<prefix>_00001.safetensors` in the folder. Raises ValueError for a prefix with no letter in it.

    Everything but letters, digits, blank, dash, underscore and dot is dropped, so no prefix leaves the folder.
    """
    import folder_paths

    name = re.sub(r"[^\w\-. ]", "", prefix).strip(". ")[:80]
    if not name:
        raise ValueError(f"file name {prefix!r} has no letters or digits: write a name such as 'my cat'.")
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (folder / f"{name}_{number:05}.safetensors").exists():
        number += 1
    return folder / f"{name}_{number:05}.safetensors"


def save(kv: KVEmbeddings, path: Path) -> None:
    """Write embeddings so that the file is whole or not there. Raises OSError with a way out when the disk is full."""
    tensors = {
        f"{part}.{i:04}": piece.contiguous()
        for part in (LEARNED, SOURCE)
        for i, piece in enumerate(getattr(kv, part))
        if piece is not None
    }
    tensors |= {"scalars": kv.scalars.contiguous(), "noise": kv.noise.contiguous()}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "sigmas": json.dumps(kv.sigmas),
        "layers": json.dumps([asdict(layer) for layer in kv.layers]),
        "span": json.dumps(kv.span),
        "rank": json.dumps([kv.rank, kv.source_rank]),
        "folded": json.dumps(kv.folded),
        "layout": kv.layout,
        "info": json.dumps(kv.info),
    }
    free = shutil.disk_usage(path.parent).free
    if free < kv.bytes + (1 << 20):
        raise OSError(
            f"{path.name} needs {kv.bytes / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free: make room, or tune "
            "with a rank, keyframes or fewer layers."
        )
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str) -> KVEmbeddings:
    """Read embeddings. Raises ValueError that says what is wrong with a foreign, newer, cut-off or damaged file."""
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"{name} is not a file of KV embeddings (no {FORMAT!r} mark in it): pick one saved by Save KV."
                )
            version = int(header.get("version", 0))
            if version != VERSION:
                newer = "a newer version of this pack: update Palimpsest to read it."
                older = "an early version of this pack, before its first release: tune the picture again."
                raise ValueError(f"{name} was saved by {newer if version > VERSION else older}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{name} is cut off or damaged ({error}): save it again, or copy it again from its source."
        ) from error
    try:
        return from_file(header, tensors)
    except (KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise ValueError(f"{name} is damaged: {error}. Save it again.") from error


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
