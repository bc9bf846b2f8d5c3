"""The host's base directory: links to the pack and to models, by what the system allows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from .places import PACK, ROOT, Problem


def prepare_base(base: Path, pack: Path, models: Path | None, examples: bool = True) -> None:
    """The host's base directory: custom_nodes with this pack alone, models, input with the tests' pictures."""
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_folder(pack, base / "custom_nodes" / PACK)
    for folder in (models, ROOT / "tests" / "pocket" / "models" if examples else None):
        for file in folder.rglob("*") if folder else ():
            if file.is_file() and not file.name.startswith("."):
                link_file(file, base / "models" / file.relative_to(folder))
    for picture in (ROOT / "tests" / "data" / "input").glob("*") if examples else ():
        if picture.suffix in {".png", ".jpg", ".webp"}:
            shutil.copy2(picture, base / "input" / picture.name)


def link_folder(source: Path, link: Path) -> None:
    """A symbolic link, else (Windows) a junction, else a copy."""
    if os.path.realpath(link) == os.path.realpath(source):
        return
    remove_link(link)
    try:
        link.symlink_to(source, target_is_directory=True)
    except OSError:
        try:
            import _winapi

            _winapi.CreateJunction(str(source), str(link))
        except (ImportError, OSError):
            shutil.copytree(source, link, ignore=shutil.ignore_patterns(".dev", ".git", "output", "__pycache__"))


def remove_link(link: Path) -> None:
    """Remove a link, a junction or a copy, never what a link leads to."""
    if link.is_symlink():
        link.unlink()
    elif link.is_dir():
        try:
            link.rmdir()  # a junction goes, and so does an empty folder
        except OSError:
            shutil.rmtree(link)


def link_file(source: Path, link: Path) -> None:
    """A symbolic link, else a hard link, else a copy."""
    if os.path.realpath(link) == os.path.realpath(source):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    for make in (os.symlink, os.link, shutil.copy2):
        try:
            make(source, link)
            return
        except OSError:
            continue
    raise Problem(f"Could not link or copy {source} to {link}: check the rights of that folder")


def offer_models(models: Path | None, base: Path) -> list[str]:
    """Host options that add another models folder (ComfyUI's layout) to the isolated base."""
    if models is None:
        return []
    if not models.is_dir():
        raise Problem(f"There is no models folder {models}: give --models a folder in ComfyUI's layout")
    folders = {folder.name: folder.name for folder in sorted(models.iterdir()) if folder.is_dir()}
    base.mkdir(parents=True, exist_ok=True)
    config = base / "extra_models.yaml"  # JSON is YAML
    config.write_text(json.dumps({"more": {"base_path": str(models.absolute()), **folders}}), encoding="utf-8")
    return ["--extra-model-paths-config", str(config)]
