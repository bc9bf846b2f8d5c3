"""Where things lie, and the one error of dev.py."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / ".dev"
MODELS = DEV / "models"
PACK = "palimpsest"
POCKET = MODELS / "checkpoints" / "palimpsest_pocket.safetensors"
POCKET_EDIT = "palimpsest_pocket_edit.safetensors"  # the same as an InstructPix2Pix model, which ignores the picture
POCKET_POSE = "palimpsest_pocket_pose.safetensors"  # its ControlNet for poses
TIERS = ("maths", "host", "browser")


class Problem(Exception):
    """A foreseeable failure, told in one sentence that says what to do."""
