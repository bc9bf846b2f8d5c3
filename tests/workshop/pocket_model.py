"""The pocket model's files, assembled from the weights in tests/pocket."""

from __future__ import annotations

from pathlib import Path

from .places import MODELS, POCKET, POCKET_EDIT, POCKET_POSE, ROOT, Problem
from .steps import digest, is_done, mark_done, run_logged, step

EDIT_UNET = "unet_edit.safetensors"


def build_pocket_model(python: Path) -> None:
    """Assemble the pocket checkpoint from the weights in tests/pocket."""
    source = ROOT / "tests" / "pocket"
    if not (source / "checkpoint.py").is_file():
        raise Problem(f"{source / 'checkpoint.py'} is missing: work in a complete copy of the repository")
    parts = [source / name for name in ("checkpoint.py", "flow_files.py", "text_encoder.py", "weights")]
    pose = source.parent / "pose_control"
    edit = source.parent / "instruction"
    parts += [pose / "pocket_control.py", pose / "weights", edit / "edit_checkpoint.py", edit / "models" / EDIT_UNET]
    stamp, key = MODELS / ".pocket-stamp", digest(*parts)
    if is_done(stamp, key) and POCKET.is_file():
        return
    POCKET.parent.mkdir(parents=True, exist_ok=True)
    with step("building the pocket model"):
        run_logged([python, source / "checkpoint.py", "--out", POCKET], "pocket")
        build_edit_model(python, POCKET.parent)
        run_logged([python, source / "flow_files.py", "--out", MODELS], "pocket-flow")
        build_pose_control(python, MODELS)
    mark_done(stamp, key)


def build_edit_model(python: str | Path, folder: Path) -> None:
    """Make the pocket's InstructPix2Pix model, which was taught to edit, beside the pocket checkpoint of a folder."""
    program = ROOT / "tests" / "instruction" / "edit_checkpoint.py"
    run_logged([python, program, "--of", folder / POCKET.name, "--out", folder / POCKET_EDIT], "pocket_edit")


def build_pose_control(python: str | Path, models: Path) -> None:
    """Make the pocket's ControlNet for poses in a models folder."""
    program = ROOT / "tests" / "pose_control" / "pocket_control.py"
    run_logged([python, program, "--out", models / "controlnet" / POCKET_POSE], "pocket_pose")
