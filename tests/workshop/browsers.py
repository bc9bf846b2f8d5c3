"""Chromium, Node.js and playwright for the tests in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .places import DEV, Problem
from .steps import digest, is_done, mark_done, only_one, run_logged, step

PLAYWRIGHT = "playwright-core@1.65.1"
OLDEST_NODE = 18


@dataclass(frozen=True)
class Browser:
    """Chromium and the folder whose node_modules holds playwright-core."""

    chromium: Path
    node_path: Path


def prepare_browser() -> Browser:
    """Find or install what the browser tests need. Raises Problem with the reason where that cannot be done."""
    with only_one():
        chromium = find_chromium()
        if chromium is None or not find_node():
            install_by_apt()
            chromium = find_chromium()
        if chromium is None:
            raise Problem("No Chromium or Chrome was found: install one, or name it in the variable CHROMIUM")
        if not find_node():
            raise Problem(f"Node.js {OLDEST_NODE} or newer with npm was not found: install it")
        return Browser(chromium, install_playwright())


def find_chromium() -> Path | None:
    """CHROMIUM, else the usual names on the path, else the usual places on macOS and Windows."""
    if os.environ.get("CHROMIUM"):
        return Path(os.environ["CHROMIUM"])
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if found := shutil.which(name):
            return Path(found)
    places = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Chromium", "Google Chrome")]
    for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
        if folder := os.environ.get(variable):
            places.append(f"{folder}/Google/Chrome/Application/chrome.exe")
    return next((Path(place) for place in places if Path(place).is_file()), None)


def find_node() -> bool:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        return False
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    return bool(re.match(r"v\d+", version)) and int(version[1:].split(".")[0]) >= OLDEST_NODE


def install_by_apt() -> None:
    """On Debian and Ubuntu, as root, install what is missing; elsewhere do nothing."""
    if not shutil.which("apt-get") or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    packages = [] if find_chromium() else ["chromium", "fonts-dejavu-core"]
    packages += [] if find_node() else ["nodejs", "npm"]
    with step(f"installing {', '.join(packages)} by apt"):
        run_logged(["apt-get", "update"], "apt-update")
        run_logged(["apt-get", "install", "-y", "--no-install-recommends", *packages], "apt-install")


def install_playwright() -> Path:
    folder = DEV / "node"
    stamp, key = folder / ".stamp", digest(PLAYWRIGHT)
    if not is_done(stamp, key):
        folder.mkdir(parents=True, exist_ok=True)
        with step(f"installing {PLAYWRIGHT}"):
            npm = [shutil.which("npm"), "install", "--prefix", folder, "--no-save", "--no-audit", "--no-fund"]
            run_logged([*npm, PLAYWRIGHT], "npm")
        mark_done(stamp, key)
    return folder
