"""A host that has what the registry's archive ships and nothing else: every template opens without an error.

A checkpoint that is not there is offered for download; that is all that may be missing.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
from pathlib import Path

import prepared
import pytest
from browser.editor import needs_browser
from browser.test_workflows import ROOT, SCREENSHOTS, open_editor
from graphs.parts import CHECKPOINT
from graphs.shipped import WORKFLOWS

dev = prepared.load_dev()
LARGEST_ARCHIVE = 3_000_000  # bytes, before it is packed


def left_out(folder: str, names: list[str]) -> set[str]:
    """Which of a folder's names .comfyignore leaves out, as shutil.copytree asks."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    here = Path(folder).relative_to(ROOT)
    return {
        name
        for name in names
        for pattern in patterns
        if fnmatch.fnmatch(f"/{here / name}" if pattern.startswith("/") else name, pattern.rstrip("/"))
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The pack as the registry hands it out."""
    target = tmp_path_factory.mktemp("archive") / dev.PACK
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


@pytest.fixture(scope="module")
def plain_host(archive, tmp_path_factory):
    needs_browser()
    comfy = os.environ.get("COMFYUI_PATH")
    if not comfy:
        pytest.skip("needs ComfyUI: run `python dev.py test`")
    base = tmp_path_factory.mktemp("plain")
    with dev.start_host(sys.executable, comfy, base, pack=archive, models=None, examples=False) as host:
        yield host


@pytest.fixture(scope="module")
def editor(plain_host):
    with open_editor(plain_host, "canvas", "en") as opened:
        yield opened


def test_the_archive_is_small_and_has_no_tests(archive):
    assert not (archive / "tests").exists()
    assert not any(archive.glob(".*"))
    assert {"subgraphs", "workflows", "nodes", "web", "__init__.py"} <= {path.name for path in archive.iterdir()}
    assert sum(path.stat().st_size for path in archive.rglob("*") if path.is_file()) < 2 * LARGEST_ARCHIVE
    packed = shutil.make_archive(str(archive.parent / "packed"), "zip", archive)
    assert Path(packed).stat().st_size < LARGEST_ARCHIVE


def sees_missing_files() -> bool:
    """Whether the host's editor is one whose lists of missing files we know."""
    version = os.environ.get("PALIMPSEST_HOST_VERSION", dev.DEFAULT_RELEASE)
    return version not in dev.RELEASES or version == dev.DEFAULT_RELEASE


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_without_an_error(editor, workflow):
    asked = {"workflow": str(workflow), "screenshot": str(SCREENSHOTS / f"{workflow.stem}.plain.png"), "run": False}
    report = editor.ask(asked)
    assert report["missing"] == [], "node types the editor does not know"
    assert report["pageErrors"] == []
    assert report["badRequests"] == []
    if not report["lacking"]["stores"]:
        assert not sees_missing_files(), "the editor keeps what is missing somewhere else: this test sees nothing"
        pytest.skip("this older editor does not tell what is missing")
    assert report["lacking"]["media"] == []
    assert report["lacking"]["models"] == [[CHECKPOINT["name"], CHECKPOINT["url"], CHECKPOINT["directory"]]]


def test_the_host_logged_no_error(plain_host):
    assert "ERROR" not in plain_host.log_path.read_text(encoding="utf-8", errors="replace")
