"""The pocket world: a drawn world of animals in which the ideal result of an edit is known.

A Scene is what its caption tells (species, colour, pose, side, place) plus what the caption never tells: the animal's
identity (facing, size, coat, collar, ...) and the layout of the background. Drawing the same scene with another pose
therefore gives the picture that an edit of the pose should have produced: `render(edit(scene, pose="sitting"))`.

Some pictures have a sign (signs.py): a board on a post, or on the wall of a room, whose text the caption tells. It
stands behind the animal, and a scene without one is drawn as if there were no signs.

Everything is painted from signed distances (negative inside), so edges are smooth at any size. Only numpy is needed,
and Pillow for the letters of signs.

    python tests/pocket/world.py tests/pocket/world.png        draws the README's contact sheet, and world_signs.png
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np

if __package__:
    from . import signs
else:  # beside a program in this folder
    import signs

SPECIES = ["cat", "dog", "rabbit", "bird"]
COLOURS = ["red", "yellow", "blue", "white", "black", "brown"]
POSES = ["standing", "sitting", "lying", "running", "jumping"]
SIDES = ["left", "right"]
PLACES = ["park", "beach", "snow", "night", "room"]
PATTERNS = ["plain", "stripes", "spots", "patch"]

CAPTIONED = {"species": SPECIES, "colour": COLOURS, "pose": POSES, "side": SIDES, "place": PLACES}
HIDDEN = {
    "facing": [-1, 1],
    "pattern": PATTERNS,
    "second": [0, 1, 2, 3],
    "collar": [0, 1, 2, 3, 4, 5],
    "socks": [False, True],
    "tailtip": [False, True],
}
ATTRIBUTES = {**CAPTIONED, **HIDDEN}
"""The values every judged attribute can take: first those a caption tells, then those it never tells."""

PLACE_PHRASES = {
    "park": "in the park",
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "at night",
    "room": "in a room",
}
COAT_RGB = {
    "red": (204, 60, 50),
    "yellow": (240, 200, 62),
    "blue": (72, 112, 214),
    "white": (238, 238, 234),
    "black": (58, 56, 64),
    "brown": (142, 92, 58),
}
SECOND_RGB = [(246, 240, 226), (44, 40, 46), (250, 214, 150), (96, 60, 40)]  # cream, near black, sand, dark brown
COLLAR_RGB = [(225, 40, 150), (40, 190, 90), (250, 250, 250), (250, 140, 20), (40, 200, 220), (130, 60, 190)]
SKY_RGB = {  # top, horizon
    "park": ((120, 190, 240), (205, 232, 250)),
    "beach": ((250, 190, 120), (255, 232, 180)),
    "snow": ((165, 178, 198), (214, 222, 234)),
    "night": ((24, 28, 72), (62, 62, 128)),
    "room": ((214, 168, 160), (222, 180, 170)),
}
GROUND_RGB = {
    "park": (110, 180, 84),
    "beach": (232, 206, 150),
    "snow": (244, 247, 252),
    "night": (44, 84, 66),
    "room": (168, 120, 78),
}
PART_KINDS = ("coat", "collar", "legs", "tail")
SIGN_PARTS = ("post", "board", "letters")
SIGN_FRAME = 0.009  # width of the dark line around a board
LINE_WIDTH = 0.055  # of the dark line around the animal, in units of its size
HELD_OUT_SEED = 77
SIGN_STREAM = 12  # appended to a seed: signs come from a stream of their own


@dataclass(frozen=True)
class Scene:
    """One picture. Lengths of the picture are fractions of its side, y down; colours are 0..255."""

    # told by the caption
    species: str
    colour: str  # the coat's first colour
    pose: str
    side: str  # half of the picture the animal stands in
    place: str
    # hidden: the animal's identity
    facing: int = 1  # 1 looks right, -1 looks left
    size: float = 0.285  # one unit of the skeleton, as a fraction of the picture's side
    dx: float = 0.0  # displacement of the animal
    dy: float = 0.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)  # added to the coat's first colour
    pattern: str = "plain"
    angle: float = 0.0  # of the stripes, radians
    freq: float = 2.0  # stripes per unit of the skeleton
    phase: float = 0.0  # of the stripes; times 2 pi the direction of the patch
    second: int = 0  # index into SECOND_RGB: stripes, spots, patch, socks, tail tip (and some dogs' ears)
    texseed: int = 0  # of the spots
    collar: int = 0  # index into COLLAR_RGB
    socks: bool = False
    tailtip: bool = False
    # hidden: the background's layout
    horizon: float = 0.62
    prop: float = 0.3  # place of the tree, sun, moon or window along x; also seeds the stars
    prop_s: float = 1.0  # its size
    bgtint: tuple[float, float, float] = (0.0, 0.0, 0.0)  # added to the background's colours
    sign: signs.Sign | None = None  # its text is told by the caption

    @classmethod
    def from_dict(cls, values: dict) -> Scene:
        """The scene that `dataclasses.asdict` (possibly through JSON, which turns tuples to lists) was given."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        sign = values.get("sign")
        return cls(**values | {"sign": signs.Sign(**sign) if sign else None})


# ---------------------------------------------------------------------------------------------- sampling and captions


def sample_scene(rng: np.random.Generator, **fixed) -> Scene:
    """A random scene; `fixed` names fields that are given. The second colour always differs visibly from the first."""

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def pick(values: list):
        return values[int(rng.integers(len(values)))]

    # The order of the draws is part of the data set: a change here changes every scene of every seed.
    colour = fixed.get("colour", pick(COLOURS))
    second = _distinct_second(colour, int(rng.integers(4)), rng)
    scene = Scene(
        species=pick(SPECIES),
        colour=colour,
        pose=pick(POSES),
        side=pick(SIDES),
        place=pick(PLACES),
        facing=1 if rng.random() < 0.5 else -1,
        size=uniform(0.272, 0.302),
        dx=uniform(-0.03, 0.03),
        dy=uniform(-0.02, 0.02),
        tint=tuple(uniform(-9, 9) for _ in range(3)),
        pattern=pick(PATTERNS),
        angle=uniform(-0.7, 0.7),
        freq=uniform(1.9, 2.7),
        phase=uniform(0, 1),
        second=second,
        texseed=int(rng.integers(1 << 30)),
        collar=int(rng.integers(6)),
        socks=bool(rng.random() < 0.4),
        tailtip=bool(rng.random() < 0.4),
        horizon=uniform(0.56, 0.68),
        prop=uniform(0.08, 0.92),
        prop_s=uniform(0.8, 1.2),
        bgtint=tuple(uniform(-10, 10) for _ in range(3)),
    )
    return replace(scene, **fixed)


def _distinct_second(colour: str, second: int, rng: np.random.Generator) -> int:
    """Move a second colour that would be lost on `colour` to one that shows."""
    if colour == "white" and second in (0, 2):
        return 1 if rng.random() < 0.5 else 3
    if colour == "black" and second in (1, 3):
        return 0 if rng.random() < 0.5 else 2
    return {("yellow", 2): 3, ("brown", 3): 0}.get((colour, second), second)


def held_out_scenes(n: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """`n` scenes of a seed that no training uses; the first n of any longer list."""
    return [sample_scene(np.random.default_rng([seed, i])) for i in range(n)]


def add_sign(rng: np.random.Generator, *scenes: Scene, held_out: bool = False) -> tuple[Scene, ...]:
    """The scenes, all with one sign, whose letters no animal of theirs hides if that can be.

    `held_out`: its text has a pair of letters that no training shows; else it has none.
    """
    masks = [Animal(scene, Canvas(64)).mask() for scene in scenes]
    found = [signs.clear_place(rng, masks, text=signs.sample_text(rng, held_out=held_out))]
    while found[-1][1] > 0 and len(found) < 4:  # a long text beside a jumping animal: try others
        found.append(signs.clear_place(rng, masks, text=signs.sample_text(rng, held_out=held_out)))
    sign, _ = min(found, key=lambda pair: pair[1])
    return tuple(replace(scene, sign=sign) for scene in scenes)


def held_out_signs(n: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """The scenes of `held_out_scenes`, each with a sign whose text is held out too."""
    return [
        add_sign(np.random.default_rng([seed, i, SIGN_STREAM]), scene, held_out=True)[0]
        for i, scene in enumerate(held_out_scenes(n, seed))
    ]


def rewrite(scene: Scene, text: str) -> Scene:
    """The scene an ideal edit of the sign's text leads to: the same board. Raises ValueError where that cannot be."""
    if scene.sign is None:
        raise ValueError(f"rewrite: {caption(scene)!r} has no sign; add_sign gives it one")
    return replace(scene, sign=signs.rewrite(scene.sign, text))


def lines(scene: Scene) -> list[signs.Line]:
    """The lines of text in the picture and their boxes, whether or not an animal stands before them."""
    return [signs.line_of(scene.sign)] if scene.sign else []


def edit(scene: Scene, **changes) -> Scene:
    """The scene an ideal edit leads to: `changes` made, identity and background kept.

    Any field may change, so that an animal with a wrong collar can be drawn too. Raises ValueError on a field or an
    attribute value that does not exist.
    """
    known = {f.name for f in fields(Scene)}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"edit: a scene has no '{name}'; it has {', '.join(sorted(known))}")
        if name in ATTRIBUTES and value not in ATTRIBUTES[name]:
            raise ValueError(f"edit: {name} cannot be {value!r}; choose one of {ATTRIBUTES[name]}")
    return replace(scene, **changes)


def caption(scene: Scene) -> str:
    """Everything a caption tells: `a <colour> <species> <pose> on the <side> <place phrase>`, and what a sign says."""
    text = f'"{scene.sign.text}"' if scene.sign else ""
    return _phrase(scene, colour=True, side=True, place=True) + _sign_phrase(scene, text)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves the colour, the side and the place out now and then, each by itself.

    A sign is always told of; one text in ten is left out, and one in ten is a `*`, which stands for any text.
    """
    phrase = _phrase(scene, colour=rng.random() > 0.12, side=rng.random() > 0.25, place=rng.random() > 0.15)
    if scene.sign is None:
        return phrase
    kind = rng.random()
    return phrase + _sign_phrase(scene, "" if kind < 0.1 else "*" if kind < 0.2 else f'"{scene.sign.text}"')


def _phrase(scene: Scene, *, colour: bool, side: bool, place: bool) -> str:
    words = ["a"] + [scene.colour] * colour + [scene.species, scene.pose]
    words += [f"on the {scene.side}"] * side + [PLACE_PHRASES[scene.place]] * place
    return " ".join(words)


def _sign_phrase(scene: Scene, text: str) -> str:
    if scene.sign is None:
        return ""
    return " with a sign" + f" that says {text}" * bool(text)


# -------------------------------------------------------------------------------------------- canvas and distances


def rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class Canvas:
    """A square float32 picture (size, size, channels) with the coordinates x, y in 0..1 of its pixels' centres."""

    def __init__(self, size: int, channels: int = 3):
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.meshgrid(axis, axis)
        self.pixel = 1.0 / size
        self.image = np.zeros((size, size, channels), np.float32)

    def paint(self, distance: np.ndarray, colour: np.ndarray, pixel: float | None = None) -> None:
        """Lay `colour` ((channels,) or (size, size, channels)) where the signed distance is negative.

        `pixel` is the width of a pixel in the distance's unit; the edge is one pixel wide.
        """
        self.blend(np.clip(0.5 - distance / (pixel or self.pixel), 0, 1), colour)

    def blend(self, coverage: np.ndarray, colour: np.ndarray) -> None:
        """Lay `colour` over each pixel by its share `coverage` (size, size)."""
        self.image[...] = self.image + (colour - self.image) * coverage[..., None]

    def multiply(self, factor: np.ndarray) -> None:
        self.image[...] = self.image * factor


def circle(x, y, cx, cy, radius) -> np.ndarray:
    return np.hypot(x - cx, y - cy) - radius


def box(x, y, cx, cy, half_width, half_height) -> np.ndarray:
    return np.maximum(abs(x - cx) - half_width, abs(y - cy) - half_height)


def capsule(x, y, start, end, radius, end_radius=None) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a rounded stroke, and the position 0..1 along it."""
    end_radius = radius if end_radius is None else end_radius
    dx, dy = end[0] - start[0], end[1] - start[1]
    length2 = dx * dx + dy * dy + 1e-9
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / length2, 0, 1)
    distance = np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)
    return distance - (radius + (end_radius - radius) * along), along


def ellipse(x, y, cx, cy, rx, ry, degrees=0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to an ellipse (first order in the edge's neighbourhood), and the coordinates u, v along its axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    dx, dy = x - cx, y - cy
    u, v = (c * dx + s * dy), (-s * dx + c * dy)
    k = np.sqrt((u / rx) ** 2 + (v / ry) ** 2) + 1e-6
    gradient = np.sqrt((u / rx**2) ** 2 + (v / ry**2) ** 2) + 1e-6
    return np.where(k > 0.2, k * (k - 1) / gradient, -min(rx, ry)).astype(np.float32), u, v


def triangle(x, y, a, b, c) -> np.ndarray:
    """Largest of the three distances to the sides: exact on the sides, mitred outside the corners."""
    turn = 1 if (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) > 0 else -1
    distance = None
    for p, q in ((a, b), (b, c), (c, a)):
        ex, ey = q[0] - p[0], q[1] - p[1]
        length = np.hypot(ex, ey) + 1e-9
        side = turn * ((x - p[0]) * ey - (y - p[1]) * ex) / length
        distance = side if distance is None else np.maximum(distance, side)
    return distance


# -------------------------------------------------------------------------------------------------- background


def paint_background(canvas: Canvas, scene: Scene) -> None:
    y, horizon = canvas.y, scene.horizon
    tint = rgb(*scene.bgtint)
    top, bottom = (rgb(*c) + tint for c in SKY_RGB[scene.place])
    depth = (y / horizon).clip(0, 1)[..., None]
    canvas.image[...] = top * (1 - depth) + bottom * depth
    _SKY_PROPS.get(scene.place, _nothing)(canvas, scene, tint)
    ground = rgb(*GROUND_RGB[scene.place]) + tint * 0.5
    depth = ((y - horizon) / (1 - horizon)).clip(0, 1)[..., None]
    below = np.clip(0.5 + (y - horizon) * len(y), 0, 1)[..., None]
    canvas.image[...] = canvas.image * (1 - below) + (ground * (1 - 0.18 * depth)) * below
    _GROUND_PROPS.get(scene.place, _nothing)(canvas, scene, tint)


def _nothing(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    pass


def _sun_and_sea(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    x, y, horizon = canvas.x, canvas.y, scene.horizon
    canvas.paint(np.hypot(x - scene.prop, y - 0.2) - 0.08 * scene.prop_s, rgb(255, 250, 215))
    canvas.paint(np.maximum(horizon - 0.13 - y, y - horizon), rgb(40, 150, 190) + tint)


def _moon_and_stars(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    x, y, size = canvas.x, canvas.y, scene.prop_s
    canvas.paint(np.hypot(x - scene.prop, y - 0.17) - 0.075 * size, rgb(246, 242, 200))
    canvas.paint(np.hypot(x - scene.prop - 0.035, y - 0.155) - 0.06 * size, rgb(34, 38, 84) + tint)
    rng = np.random.default_rng(int(scene.prop * 1e6))
    for _ in range(6):
        canvas.paint(circle(x, y, rng.uniform(0, 1), rng.uniform(0.02, 0.45), 0.011), rgb(240, 240, 215))


def _window(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    x, y, prop, half = canvas.x, canvas.y, scene.prop, 0.11 * scene.prop_s
    across, up = abs(x - prop), abs(y - 0.24)
    canvas.paint(np.maximum(across - half, up - half * 0.9), rgb(245, 240, 230))
    canvas.paint(np.maximum(across - half + 0.022, up - half * 0.9 + 0.022), rgb(110, 180, 225))
    canvas.paint(np.maximum(across - 0.009, up - half * 0.9), rgb(245, 240, 230))


def _tree(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    x, y, prop, size, horizon = canvas.x, canvas.y, scene.prop, scene.prop_s, scene.horizon
    trunk = np.maximum(abs(x - prop) - 0.022 * size, abs(y - horizon + 0.06) - 0.09)
    canvas.paint(trunk, rgb(112, 78, 50))
    crown, _, _ = ellipse(x, y, prop, horizon - 0.24 * size, 0.13 * size, 0.15 * size)
    canvas.paint(crown, rgb(60, 136, 70) + tint)


def _fir(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    prop, size, horizon = scene.prop, scene.prop_s, scene.horizon
    for i in range(3):
        foot, half = horizon - 0.09 * i * size, (0.12 - 0.025 * i) * size
        tip = (prop, horizon - (0.16 + 0.09 * i) * size)
        tier = triangle(canvas.x, canvas.y, (prop - half, foot), (prop + half, foot), tip)
        canvas.paint(tier, rgb(40, 96 + 8 * i, 84) + tint)


def _skirting_board(canvas: Canvas, scene: Scene, tint: np.ndarray) -> None:
    canvas.paint(abs(canvas.y - scene.horizon) - 0.012, rgb(240, 226, 214))


_SKY_PROPS = {"beach": _sun_and_sea, "night": _moon_and_stars, "room": _window}
_GROUND_PROPS = {"park": _tree, "snow": _fir, "room": _skirting_board}


# ---------------------------------------------------------------------------------------------------------- signs


def sign_shares(scene: Scene, canvas: Canvas) -> dict[str, np.ndarray]:
    """Share of each pixel (N, N) that the sign's post, its board and its letters have, each over the ones before."""
    sign, x, y = scene.sign, canvas.x, canvas.y
    if sign is None:
        return {name: np.zeros_like(x) for name in SIGN_PARTS}
    post = box(x, y, sign.x, (sign.y + sign.foot) / 2, 0.016, (sign.foot - sign.y) / 2)
    shares = {"post": post, "board": box(x, y, sign.x, sign.y, sign.width / 2, sign.height / 2)}
    shares = {name: np.clip(0.5 - distance / canvas.pixel, 0, 1) for name, distance in shares.items()}
    if scene.place == "room":  # it hangs on the wall
        shares["post"] = np.zeros_like(x)
    return shares | {"letters": signs.letters(sign, len(x))}


def paint_sign(canvas: Canvas, scene: Scene) -> None:
    sign = scene.sign
    if sign is None:
        return
    shares, (board, letters) = sign_shares(scene, canvas), signs.BOARD_RGB[sign.board]
    inner = box(canvas.x, canvas.y, sign.x, sign.y, sign.width / 2 - SIGN_FRAME, sign.height / 2 - SIGN_FRAME)
    canvas.blend(shares["post"], rgb(112, 84, 60))
    canvas.blend(shares["board"], rgb(28, 24, 30))
    canvas.paint(inner, rgb(*board))
    canvas.blend(shares["letters"], rgb(*letters))


# ------------------------------------------------------------------------------------------------------ skeleton

Point = tuple[float, float]
Stroke = tuple[Point, Point]


@dataclass(frozen=True)
class Skeleton:
    """Where the parts of an animal are: looking right, y up, in units of its size, from the point it stands on."""

    body: tuple[float, float, float, float, float]  # ellipse: x, y, rx, ry, degrees
    head: Point
    hind_legs: list[Stroke]  # near, then far if there is one
    tail: list[Point]
    fore_legs: list[Stroke]
    haunch: tuple[float, float, float, float] | None = None  # ellipse: x, y, rx, ry
    wing: tuple[float, float, float, float, float] | None = None  # ellipse, x and y from the body's centre


SKELETONS = {
    "standing": Skeleton(
        body=(0, 0.70, 0.55, 0.30, 0),
        head=(0.62, 1.12),
        fore_legs=[((0.36, 0.55), (0.39, 0.07)), ((0.20, 0.55), (0.16, 0.07))],
        hind_legs=[((-0.34, 0.55), (-0.31, 0.07)), ((-0.46, 0.55), (-0.52, 0.07))],
        tail=[(-0.50, 0.80), (-0.78, 1.00), (-0.84, 1.30)],
    ),
    "sitting": Skeleton(
        body=(-0.05, 0.62, 0.55, 0.30, 58),
        head=(0.32, 1.36),
        fore_legs=[((0.24, 0.78), (0.36, 0.07)), ((0.14, 0.70), (0.18, 0.07))],
        hind_legs=[((-0.16, 0.13), (0.08, 0.07))],
        tail=[(-0.38, 0.14), (-0.70, 0.09), (-0.98, 0.20)],
        haunch=(-0.20, 0.27, 0.29, 0.24),
    ),
    "lying": Skeleton(
        body=(0, 0.29, 0.60, 0.27, 0),
        head=(0.66, 0.62),
        fore_legs=[((0.40, 0.16), (0.92, 0.07)), ((0.30, 0.10), (0.72, 0.06))],
        hind_legs=[((-0.30, 0.10), (0.02, 0.06))],
        tail=[(-0.52, 0.20), (-0.80, 0.08), (-1.10, 0.08)],
        haunch=(-0.34, 0.24, 0.26, 0.21),
    ),
    "running": Skeleton(
        body=(0, 0.76, 0.62, 0.26, 4),
        head=(0.80, 1.06),
        fore_legs=[((0.40, 0.66), (0.92, 0.42)), ((0.30, 0.60), (0.70, 0.14))],
        hind_legs=[((-0.42, 0.64), (-0.92, 0.34)), ((-0.34, 0.58), (-0.66, 0.10))],
        tail=[(-0.58, 0.84), (-0.90, 0.98), (-1.20, 0.96)],
    ),
    "jumping": Skeleton(
        body=(0, 1.20, 0.57, 0.29, 32),
        head=(0.58, 1.76),
        fore_legs=[((0.38, 1.30), (0.86, 1.46)), ((0.36, 1.16), (0.80, 1.14))],
        hind_legs=[((-0.38, 0.98), (-0.66, 0.52)), ((-0.28, 0.96), (-0.40, 0.46))],
        tail=[(-0.46, 0.92), (-0.78, 0.84), (-1.02, 0.98)],
    ),
}
BIRD_WINGS = {
    "standing": (-0.08, 0.04, 0.36, 0.17, 6),
    "sitting": (-0.1, 0.02, 0.38, 0.18, 4),
    "lying": (-0.1, 0.06, 0.4, 0.15, 4),
    "running": (-0.28, 0.22, 0.40, 0.15, -32),
    "jumping": (-0.16, 0.44, 0.17, 0.46, -4),
}


def skeleton(scene: Scene) -> Skeleton:
    bones = SKELETONS[scene.pose]
    if scene.species != "bird":
        return bones
    x, y = bones.body[0] - 0.06, bones.body[1]
    legs = {
        "standing": [((x, y - 0.2), (x + 0.02, 0.04)), ((x + 0.16, y - 0.2), (x + 0.2, 0.04))],
        "sitting": [((0.02, 0.2), (0.22, 0.04))],
        "lying": [((-0.1, 0.12), (0.06, 0.03))],
        "running": [((x, y - 0.2), (x - 0.42, 0.16)), ((x + 0.14, y - 0.2), (x + 0.46, 0.06))],
        "jumping": [((x - 0.1, y - 0.26), (x - 0.36, y - 0.62)), ((x + 0.06, y - 0.24), (x - 0.06, y - 0.66))],
    }[scene.pose]
    head = (bones.head[0] - 0.06, bones.head[1] - 0.02)
    wing = BIRD_WINGS[scene.pose]
    return replace(bones, head=head, fore_legs=[], hind_legs=legs, haunch=None, wing=wing)


# ------------------------------------------------------------------------------------------------ the animal's parts


@dataclass(frozen=True)
class Part:
    distance: np.ndarray  # (N, N), signed, in units of the animal's size
    colour: np.ndarray  # (3,) or (N, N, 3)
    kind: str = ""  # one of PART_KINDS, or nothing for neck, haunch, ears, beak and wing
    second: np.ndarray | float = 0.0  # share of the second colour in `colour`: a number or (N, N)


@dataclass
class Animal:
    """The parts of one scene's animal on a canvas, collected from back to front."""

    scene: Scene
    canvas: Canvas

    def __post_init__(self):
        scene, canvas = self.scene, self.canvas
        self.ground_x = (0.37 if scene.side == "left" else 0.63) + scene.dx
        self.ground_y = 0.86 + scene.dy
        self.x = (canvas.x - self.ground_x) * scene.facing / scene.size
        self.y = (self.ground_y - canvas.y) / scene.size
        self.pixel = 1.0 / (len(canvas.x) * scene.size)
        self.bones = skeleton(scene)
        self.bird = scene.species == "bird"
        self.head_radius = 0.25 if self.bird else 0.30
        self.first_rgb = rgb(*COAT_RGB[scene.colour]) + rgb(*scene.tint)
        self.second_rgb = rgb(*SECOND_RGB[scene.second])
        self.dark_rgb = self.first_rgb * 0.72
        self.parts: list[Part] = []
        self._collect()

    def _collect(self) -> None:
        bones = self.bones
        self._tail()
        for far_leg in bones.hind_legs[1:] + bones.fore_legs[1:]:
            self._leg(far_leg, far=True)
        self._far_ear()
        self._neck()
        self._body()
        if bones.haunch:
            self._add(ellipse(self.x, self.y, *bones.haunch, 0)[0], self.first_rgb * 0.93)
        for near_leg in bones.hind_legs[:1] + bones.fore_legs[:1]:
            self._leg(near_leg, far=False)
        self._collar()
        self._muzzle()
        if self.scene.species != "dog":
            self._near_ear()
        self._head()
        if self.scene.species == "dog":  # hangs over the head
            self._near_ear()
        if bones.wing:
            self._wing()

    def _add(self, distance, colour, kind: str = "", second: np.ndarray | float = 0.0) -> None:
        self.parts.append(Part(distance, colour, kind, second))

    def _tip(self) -> tuple[np.ndarray, float]:
        """Colour of the tail's tip and its share of the second colour."""
        plain = self.dark_rgb if self.bird else self.first_rgb
        return (self.second_rgb, 1.0) if self.scene.tailtip else (plain, 0.0)

    def _tail(self) -> None:
        root, middle, end = self.bones.tail
        tip, second = self._tip()
        if self.scene.species == "rabbit":
            self._add(np.hypot(self.x - root[0] + 0.06, self.y - root[1]) - 0.15, tip, "tail", second)
        elif self.bird:
            start, stop = (root[0] + 0.12, root[1]), ((root[0] + middle[0]) / 2 - 0.12, (root[1] + middle[1]) / 2)
            self._add(capsule(self.x, self.y, start, stop, 0.12, 0.17)[0], tip, "tail", second)
        else:
            thick, thin = (0.085, 0.07) if self.scene.species == "cat" else (0.10, 0.05)
            self._add(capsule(self.x, self.y, root, middle, thick, (thick + thin) / 2)[0], self.first_rgb, "tail")
            self._add(capsule(self.x, self.y, middle, end, (thick + thin) / 2, thin)[0], tip, "tail", second)

    def _leg(self, stroke: Stroke, *, far: bool) -> None:
        shade = 0.82 if far else 1.0
        if self.bird:
            colour, foot = rgb(235, 140, 40) * shade, stroke[1]
            self._add(capsule(self.x, self.y, *stroke, 0.045, 0.045)[0], colour, "legs")
            self._add(
                capsule(self.x, self.y, (foot[0] - 0.03, foot[1]), (foot[0] + 0.12, foot[1]), 0.04)[0], colour, "legs"
            )
            return
        distance, along = capsule(self.x, self.y, *stroke, 0.095 * 1.25, 0.095)
        colour, second = self.first_rgb * shade, 0.0
        if self.scene.socks:
            second = np.clip(0.5 + (along - 0.62) * 0.5 / self.pixel, 0, 1)
            colour = colour + (self.second_rgb - colour) * second[..., None]
        self._add(distance, colour, "legs", second)

    def _far_ear(self) -> None:
        self._ear(shift=-0.24, colour=self.dark_rgb, degrees=10)

    def _near_ear(self) -> None:
        if self.scene.species == "dog":
            hx, hy = self.bones.head
            two_coloured = self.scene.second % 2  # the dark second colours show on the ear
            colour = self.second_rgb if two_coloured else self.dark_rgb
            self._add(ellipse(self.x, self.y, hx - 0.20, hy - 0.02, 0.11, 0.27, -14)[0], colour, second=two_coloured)
        self._ear(shift=0, colour=self.first_rgb, degrees=2)

    def _ear(self, shift: float, colour: np.ndarray, degrees: float) -> None:
        hx, hy = self.bones.head
        if self.scene.species == "cat":
            corners = (
                (hx - 0.02 + shift + 0.0, hy + 0.16),
                (hx + 0.26 + shift, hy + 0.16),
                (hx + 0.13 + shift * 1.15, hy + 0.52),
            )
            self._add(triangle(self.x, self.y, *corners) - 0.02, colour)
        elif self.scene.species == "rabbit":
            ear, _, _ = ellipse(self.x, self.y, hx + shift * 0.7 + 0.02, hy + 0.52, 0.095, 0.34, degrees)
            self._add(ear, colour)

    def _shoulder(self, reach: float) -> Point:
        """The point at `reach` of the body's long half axis, on the head's side."""
        x, y, rx, _, degrees = self.bones.body
        return x + reach * rx * np.cos(np.radians(degrees)), y + reach * rx * np.sin(np.radians(degrees))

    def _neck(self) -> None:
        neck, _ = capsule(self.x, self.y, self._shoulder(0.72), self.bones.head, 0.17 if self.bird else 0.20)
        self._add(neck, self.first_rgb)

    def _body(self) -> None:
        distance, u, v = ellipse(self.x, self.y, *self.bones.body)
        self._add(distance, *self._coat(u, v))

    def _head(self) -> None:
        hx, hy = self.bones.head
        distance, u, v = ellipse(self.x, self.y, hx, hy, self.head_radius * 1.05, self.head_radius * 0.95)
        if self.scene.pattern == "spots":  # spots stay on the body
            self._add(distance, self.first_rgb, "coat")
        else:
            self._add(distance, *self._coat(u, v, scale=1.15, offset=0.31))

    def _coat(self, u, v, scale: float = 1.0, offset: float = 0.0) -> tuple[np.ndarray, str, np.ndarray | float]:
        """Colour, kind and share of the second colour of a furry part with the coordinates u, v."""
        if self.scene.pattern == "plain":
            return self.first_rgb, "coat", 0.0
        second = {"stripes": self._stripes, "spots": self._spots, "patch": self._patch}[self.scene.pattern](
            u, v, scale, offset
        )
        return self.first_rgb + (self.second_rgb - self.first_rgb) * second[..., None], "coat", second

    def _stripes(self, u, v, scale: float, offset: float) -> np.ndarray:
        scene = self.scene
        across = scene.freq * (u * np.cos(scene.angle) + v * np.sin(scene.angle)) * scale + scene.phase + offset
        slope = 2 * np.pi * scene.freq * self.pixel
        return np.clip(0.5 + (np.cos(2 * np.pi * across) - 0.15) / slope, 0, 1)

    def _spots(self, u, v, scale: float, offset: float) -> np.ndarray:
        rng = np.random.default_rng(self.scene.texseed)
        centre_u, centre_v = rng.uniform(-0.6, 0.6, 12), rng.uniform(-0.34, 0.34, 12)
        second = np.zeros_like(u)
        for cu, cv, radius in zip(centre_u, centre_v, rng.uniform(0.06, 0.12, 12), strict=True):
            spot = np.hypot(u - cu - offset, v - cv) - radius
            second = np.maximum(second, np.clip(0.5 - spot / self.pixel, 0, 1))
        return second

    def _patch(self, u, v, scale: float, offset: float) -> np.ndarray:
        turn = self.scene.phase * 6.28
        return np.clip(0.5 - ((u * np.cos(turn) + v * np.sin(turn)) + 0.05) / self.pixel, 0, 1)

    def _collar(self) -> None:
        """A short stroke across the neck, where the neck meets the head."""
        (hx, hy), (nx, ny) = self.bones.head, self._shoulder(0.8)
        vx, vy = hx - nx, hy - ny
        length = np.hypot(vx, vy) + 1e-6
        vx, vy = vx / length, vy / length
        mx, my = hx - vx * self.head_radius, hy - vy * self.head_radius
        ends = (mx - vy * 0.20, my + vx * 0.20), (mx + vy * 0.20, my - vx * 0.20)
        self._add(capsule(self.x, self.y, *ends, 0.07)[0], rgb(*COLLAR_RGB[self.scene.collar]), "collar")

    def _muzzle(self) -> None:
        hx, hy = self.bones.head
        if self.scene.species == "dog":
            self._add(ellipse(self.x, self.y, hx + 0.27, hy - 0.09, 0.20, 0.13, -6)[0], self.first_rgb)
        elif self.bird:
            beak = triangle(self.x, self.y, (hx + 0.17, hy + 0.09), (hx + 0.17, hy - 0.11), (hx + 0.48, hy - 0.03))
            self._add(beak - 0.01, rgb(240, 160, 40))

    def _wing(self) -> None:
        x, y, _, _, degrees = self.bones.body
        wx, wy, rx, ry, turn = self.bones.wing
        turn = turn + (degrees if self.scene.pose != "jumping" else 0)
        self._add(ellipse(self.x, self.y, x + wx, y + wy, rx, ry, turn)[0], self.dark_rgb)

    def outline(self) -> np.ndarray:
        """Distance to the animal with the dark line around it."""
        distance = self.parts[0].distance
        for part in self.parts[1:]:
            distance = np.minimum(distance, part.distance)
        return distance - LINE_WIDTH

    def face(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Eye, pupil and nose: (distance, colour), back to front."""
        hx, hy = self.bones.head
        ex, ey = hx + 0.11, hy + 0.06
        dots = [
            (np.hypot(self.x - ex, self.y - ey) - 0.075, rgb(250, 250, 250)),
            (np.hypot(self.x - ex - 0.02, self.y - ey) - 0.05, rgb(15, 15, 20)),
        ]
        if self.scene.species == "dog":
            dots.append((np.hypot(self.x - hx - 0.44, self.y - hy + 0.05) - 0.055, rgb(15, 15, 20)))
        elif not self.bird:
            dots.append((np.hypot(self.x - hx - 0.27, self.y - hy + 0.07) - 0.045, rgb(230, 120, 140)))
        return dots

    def shadow(self) -> np.ndarray:
        """Share of the ground's shadow in each pixel (N, N); smaller under an animal in the air."""
        rx = 0.75 if self.scene.pose != "jumping" else 0.5
        distance, _, _ = ellipse(self.x, self.y, 0, 0.02, rx, 0.09)
        return np.clip(0.5 - distance / (self.pixel * 3), 0, 1)

    def mask(self) -> np.ndarray:
        return np.clip(0.5 - self.outline() / self.pixel, 0, 1)


# ------------------------------------------------------------------------------------------------------- pictures


def render(scene: Scene, size: int = 128, supersample: int = 1, with_mask: bool = False):
    """The scene's picture, uint8 (size, size, 3); with `with_mask` also the animal's mask, float32 (size, size).

    The mask covers the animal with its dark outline, not its shadow on the ground.
    """
    canvas = Canvas(size * supersample)
    paint_background(canvas, scene)
    paint_sign(canvas, scene)
    animal = Animal(scene, canvas)
    canvas.multiply(1 - 0.3 * animal.shadow()[..., None])
    canvas.paint(animal.outline(), rgb(28, 24, 30), animal.pixel)
    for part in animal.parts:
        canvas.paint(part.distance, part.colour, animal.pixel)
    for distance, colour in animal.face():
        canvas.paint(distance, colour, animal.pixel)
    picture = _shrink(canvas.image, supersample).clip(0, 255).round().astype(np.uint8)
    if not with_mask:
        return picture
    return picture, _shrink(animal.mask()[..., None], supersample)[..., 0].astype(np.float32)


def render_parts(scene: Scene, size: int = 128) -> dict[str, np.ndarray]:
    """Where the parts of the animal show: name -> share of each pixel, float32 (size, size) in 0..1.

    animal: everything inside the outline. coat: body and head; collar; legs; tail. second: the second colour, wherever
    it shows (coat, socks, tail tip, ear). shadow: the shadow on the ground, also where the animal hides it. Outside
    `animal` and `shadow`, scenes of the same background and sign are equal pixel by pixel.

    post, board, letters: what the animal leaves to be seen of them; the board is whole, also under its letters. Scenes
    that differ in the sign alone are equal outside `post` and `board`.
    """
    names = [*PART_KINDS, "second"]
    canvas = Canvas(size, len(names))
    animal = Animal(scene, canvas)
    for part in animal.parts:
        shares = np.zeros((size, size, len(names)), np.float32)
        shares[..., :-1] = [part.kind == kind for kind in PART_KINDS]
        shares[..., -1] = part.second
        canvas.paint(part.distance, shares, animal.pixel)
    for distance, _ in animal.face():
        canvas.paint(distance, np.zeros(len(names), np.float32), animal.pixel)
    parts = {name: canvas.image[..., i].clip(0, 1) for i, name in enumerate(names)}
    parts = {"animal": animal.mask(), **parts, "shadow": animal.shadow()}
    parts |= {name: share * (1 - animal.mask()) for name, share in sign_shares(scene, canvas).items()}
    return {name: share.astype(np.float32) for name, share in parts.items()}


def _shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean over factor x factor blocks: (N, N, C) -> (N / factor, N / factor, C)."""
    if factor == 1:
        return image
    size = len(image) // factor
    return image.reshape(size, factor, size, factor, -1).mean((1, 3))


def contact_sheet(rows: Iterable[Iterable[Scene]], size: int = 128) -> np.ndarray:
    """One picture per scene, in rows: uint8 (rows * size, columns * size, 3)."""
    return np.concatenate([np.concatenate([render(scene, size) for scene in row], 1) for row in rows], 0)


def readme_rows() -> list[list[Scene]]:
    """Three rows of different scenes, then one animal through each kind of edit."""
    varied = [
        [
            sample_scene(np.random.default_rng([7, 10 * row + i]), species=SPECIES[(row + i) % 4], pose=POSES[i % 5])
            for i in range(10)
        ]
        for row in range(3)
    ]
    scene = sample_scene(np.random.default_rng([7, 0]), species="cat", pose="standing", pattern="stripes", second=0)
    scene = replace(scene, colour="brown", place="park", side="left", socks=True, tailtip=True)
    poses = [edit(scene, pose=pose) for pose in POSES]
    others = [
        edit(scene, species="dog"),
        edit(scene, colour="blue"),
        edit(scene, side="right"),
        edit(scene, place="snow"),
        edit(scene, place="night", pose="lying"),
    ]
    return [*varied, poses + others]


def sign_rows() -> list[list[Scene]]:
    """A row of different signs, then one scene through edits of the text and of other things."""
    varied = [
        add_sign(np.random.default_rng([5, i]), sample_scene(np.random.default_rng([5, i])))[0] for i in range(10)
    ]
    scene = sample_scene(np.random.default_rng([7, 0]), species="cat", pose="sitting", colour="brown", place="park")
    sign = signs.make("HOTEL", 22 * signs.PIXEL, x=0.58, y=0.18, foot=0.76, board=0)
    scene = edit(scene, side="left", facing=1, sign=sign)
    edits = [
        scene,
        *(rewrite(scene, text) for text in ("CAFE", "大山", "XQJ")),
        edit(scene, sign=None),
        *(edit(scene, **change) for change in ({"pose": "lying"}, {"species": "dog"}, {"colour": "blue"})),
        *(edit(scene, place=place) for place in ("night", "room")),
    ]
    return [varied, edits]


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from PIL import Image

    out = Path(sys.argv[1] if len(sys.argv) > 1 else "world.png")
    Image.fromarray(contact_sheet(readme_rows())).save(out)
    Image.fromarray(contact_sheet(sign_rows())).save(out.with_name(out.stem + "_signs.png"))
