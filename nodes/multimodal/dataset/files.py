"""Where datasets of interleaved prompts and object detectors lie: folders, listed by the host's own folder lists."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ... import files as storage
from ...quoting import quoted

DATASETS = "palimpsest_datasets"  # in the host's output folder, and in its input folder
DETECTORS = storage.ModelFolders(
    folder="palimpsest_detectors",
    put="grounding_dino_folders",
    what="detector",
    hint="put a GroundingDINO there, and refresh",
)
CONNECTED = "(the connected one)"
NO_DETECTOR = "none"


def datasets() -> dict[str, Path]:
    """Every dataset by name: in output/palimpsest_datasets, then in input/palimpsest_datasets."""
    import folder_paths

    roots = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    return storage.folders_with("dataset.json", (Path(root) / DATASETS for root in roots))


def dataset_names() -> list[str]:
    """Names of the datasets, as a node offers them, after "(the connected one)"."""
    return [CONNECTED, *sorted(datasets())]


def dataset_path(name: str) -> Path:
    """Where a dataset lies. Raises ValueError for a name that is none of them."""
    known = datasets()
    if name not in known:
        have = ", ".join(sorted(known)) or "nothing"
        raise ValueError(
            f"there is no dataset {quoted(name)} in output/{DATASETS} or input/{DATASETS}, only {have}: connect "
            "dataset, or make one with Build Multimodal Dataset and refresh."
        )
    return known[name]


@contextmanager
def new_dataset(prefix: str) -> Iterator[Path]:
    """A new folder output/palimpsest_datasets/<prefix>_00001, gone again where it does not get done.

    Raises ValueError for a prefix without a letter.
    """
    import folder_paths

    name = storage.safe_name(prefix, "folder", "my pictures")
    folder = storage.first_free(Path(folder_paths.get_output_directory()) / DATASETS, name)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def detector_names() -> list[str]:
    """Names of the detector folders, as a node offers them, after "none"."""
    return [NO_DETECTOR, *sorted(DETECTORS.found())]
