"""Where datasets of interleaved prompts and object detectors lie: folders, listed by the host's own folder lists."""

from __future__ import annotations

import re
from pathlib import Path

DATASETS = "multimodal_datasets"  # in the host's output folder, and in its input folder
DETECTORS = "open_detectors"  # in the host's models folder
CONNECTED = "(the connected one)"
NO_DETECTOR = "none"


def register_folder() -> None:
    """Tell the host about models/open_detectors."""
    import folder_paths

    path = str(Path(folder_paths.models_dir) / DETECTORS)
    paths, extensions = folder_paths.folder_names_and_paths.get(DETECTORS, ([], set()))
    folder_paths.folder_names_and_paths[DETECTORS] = (
        [*paths, *([] if path in paths else [path])],
        extensions | {".safetensors"},
    )


def by_name(roots: list[Path], marker: str) -> dict[str, Path]:
    """Folders that hold a marker file, by name, directly in some roots or one folder deeper; the first root wins."""
    files = [(root, file) for root in roots for deep in ("*", "*/*") for file in root.glob(f"{deep}/{marker}")]
    return {file.parent.relative_to(root).as_posix(): file.parent for root, file in reversed(files)}


def datasets() -> dict[str, Path]:
    """Every dataset by name: in output/multimodal_datasets, then in input/multimodal_datasets."""
    import folder_paths

    roots = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    return by_name([Path(root) / DATASETS for root in roots], "dataset.json")


def dataset_names() -> list[str]:
    """Names of the datasets, as a node offers them, after "(the connected one)"."""
    return [CONNECTED, *sorted(datasets())]


def dataset_path(name: str) -> Path:
    """Where a dataset lies. Raises ValueError for a name that is none of them."""
    known = datasets()
    if name not in known:
        have = ", ".join(sorted(known)) or "nothing"
        raise ValueError(
            f"there is no dataset {name!r} in output/{DATASETS} or input/{DATASETS}, only {have}: connect dataset, or "
            "make one with Build Multimodal Dataset and refresh."
        )
    return known[name]


def new_dataset(prefix: str) -> Path:
    """A new folder output/multimodal_datasets/<prefix>_00001. Raises ValueError for a prefix without a letter."""
    import folder_paths

    name = re.sub(r"[^\w\-. ]", "", prefix).strip(". ")[:80]
    if not name:
        raise ValueError(f"folder name {prefix!r} has no letters or digits: write a name such as 'my pictures'.")
    root, number = Path(folder_paths.get_output_directory()) / DATASETS, 1
    while (root / f"{name}_{number:05}").exists():
        number += 1
    folder = root / f"{name}_{number:05}"
    folder.mkdir(parents=True)
    return folder


def detectors() -> dict[str, Path]:
    """Detector folders by name."""
    import folder_paths

    if DETECTORS not in folder_paths.folder_names_and_paths:
        return {}
    return by_name([Path(path) for path in folder_paths.get_folder_paths(DETECTORS)], "config.json")


def detector_names() -> list[str]:
    """Names of the detector folders, as a node offers them, after "none"."""
    return [NO_DETECTOR, *sorted(detectors())]


def detector_path(name: str) -> Path:
    """Where a detector lies. Raises ValueError for a name that is none of them."""
    known = detectors()
    if name not in known:
        have = ", ".join(sorted(known)) or "nothing"
        raise ValueError(
            f"models/{DETECTORS} has no detector {name!r}, it has {have}: put a GroundingDINO there, and refresh."
        )
    return known[name]
