"""Where things lie, and the one error of dev.py."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / ".dev"
MODELS = DEV / "models"
PACK = "palimpsest"
POCKET = MODELS / "checkpoints" / "palimpsest_pocket.safetensors"
POCKET_EDIT = "palimpsest_pocket_edit.safetensors"  # an InstructPix2Pix model of the same world
POCKET_POSE = "palimpsest_pocket_pose.safetensors"  # its ControlNet for poses
TIERS = ("maths", "host", "browser")


class Problem(Exception):
    """A foreseeable failure, told in one sentence that says what to do."""
