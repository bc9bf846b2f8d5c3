"""Shipped workflows by their titles. The numbers before them follow from `shelf.py`, so that nothing else names one."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "workflows"


def title_of(name: str) -> str:
    """A workflow's name without its number."""
    return name.partition(" ")[2]


def name_of(title: str) -> str:
    """The whole name of the workflow with this title, as its file has it."""
    found = [path.stem for path in FOLDER.glob("*.json") if title_of(path.stem) == title]
    if len(found) != 1:
        raise ValueError(f"workflows/ has {len(found)} templates with the title {title!r}, there should be one")
    return found[0]


def thumbnail_of(title: str) -> Path:
    """Where the picture of the workflow with this title goes."""
    return FOLDER / f"{name_of(title)}.jpg"
