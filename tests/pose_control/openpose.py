"""The pose of the template, drawn as OpenPose draws a person's 18 points: coloured limbs on black.

python tests/prepared.py pose_control.openpose      workflows/pictures/palimpsest_pose.webp
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

FILE = Path(__file__).resolve().parents[2] / "workflows" / "pictures" / "palimpsest_pose.webp"
SIZE = 576, 384
SITTING = {  # upright on a seat, looking to the right
    "nose": (286, 86), "neck": (268, 122), "right shoulder": (243, 125), "right elbow": (231, 181),
    "right wrist": (268, 214), "left shoulder": (294, 122), "left elbow": (318, 172), "left wrist": (331, 212),
    "right hip": (250, 236), "right knee": (324, 252), "right ankle": (329, 336), "left hip": (285, 234),
    "left knee": (356, 241), "left ankle": (363, 326), "right eye": (280, 78), "left eye": (292, 78),
    "right ear": (266, 84), "left ear": (298, 85),
}  # fmt: skip
LIMBS = (
    ("neck", "right shoulder"), ("neck", "left shoulder"), ("right shoulder", "right elbow"),
    ("right elbow", "right wrist"), ("left shoulder", "left elbow"), ("left elbow", "left wrist"),
    ("neck", "right hip"), ("right hip", "right knee"), ("right knee", "right ankle"), ("neck", "left hip"),
    ("left hip", "left knee"), ("left knee", "left ankle"), ("neck", "nose"), ("nose", "right eye"),
    ("right eye", "right ear"), ("nose", "left eye"), ("left eye", "left ear"),
)  # fmt: skip
RAINBOW = (  # of the points in SITTING's order, and of the limbs in theirs
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
WIDTH, DIMMED = 4, 0.6  # of a point's radius and half a limb's breadth in pixels; limbs are darker than points


def draw(points: dict[str, tuple[int, int]] = SITTING, size: tuple[int, int] = SIZE) -> Image.Image:
    """The picture of a pose."""
    picture = Image.new("RGB", size)
    pen = ImageDraw.Draw(picture)
    for (start, end), colour in zip(LIMBS, RAINBOW, strict=False):
        pen.line([points[start], points[end]], tuple(int(DIMMED * c) for c in colour), 2 * WIDTH)
    for (x, y), colour in zip(points.values(), RAINBOW, strict=True):
        pen.ellipse([x - WIDTH, y - WIDTH, x + WIDTH, y + WIDTH], colour)
    return picture


def main() -> None:
    """Draw it into the templates' pictures."""
    draw().save(FILE, lossless=True)
    print(f"{FILE.name}: {FILE.stat().st_size / 1000:.1f} KB")


if __name__ == "__main__":
    main()
