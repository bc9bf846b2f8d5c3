"""Where datasets of interleaved prompts and object detectors lie: folders, listed by the host's own folder lists."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ... import files as storage
from ...names import PARTS, first_free, safe_name, within
from ...quoting import quoted
from ...writing import make_folder, not_written

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
    return storage.folders_with("dataset.json", (Path(root) / DATASETS for root in roots), PARTS)


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


def name_of(folder: Path) -> str:
    """The name of a new dataset, as nodes list it."""
    import folder_paths

    return folder.relative_to(Path(folder_paths.get_output_directory()) / DATASETS).as_posix()


@contextmanager
def new_dataset(prefix: str) -> Iterator[Path]:
    """A new folder output/palimpsest_datasets/<prefix>_00001, gone again where it does not get done.

    Raises ValueError for a prefix without a letter, OSError for a folder that cannot be made.
    """
    import folder_paths

    name, root = safe_name(prefix, "folder", "my pictures"), Path(folder_paths.get_output_directory()) / DATASETS
    folder = None
    while folder is None:
        (found,) = first_free(lambda number: [within(root, f"{name}_{number:05}")])
        try:
            make_folder(found.parent)
            found.mkdir()
            folder = found
        except FileExistsError:  # another ComfyUI took this number meanwhile
            continue
        except OSError as error:
            raise not_written(found, error, "choose another name") from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def detector_names() -> list[str]:
    """Names of the detector folders, as a node offers them, after "none"."""
    return [NO_DETECTOR, *sorted(DETECTORS.found())]
