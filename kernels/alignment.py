"""How far an edit lies off its source, found outside of a mask, and the edit moved back.

Pictures are (H, W, C), masks (H, W). A shift (right, down) in pixels says how far the edit's content lies off the
source's: E(x, y) = S(x - right, y - down).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .pausing import pause
from .robust import FEWEST, LEVEL, biweight, correlation, sampled

if TYPE_CHECKING:
    from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709-6, item 3.2
LANCZOS_RADIUS = 4
BINOMIAL = {-2: 1 / 16, -1: 4 / 16, 0: 6 / 16, 1: 4 / 16, 2: 1 / 16}
COARSE, FINE = 512, 1024  # longest side in pixels on which a shift is searched, and on which it is refined
SEARCHED = 8  # shifts of up to 1 / SEARCHED of each side are found
SAMPLES = 2**18  # pixels outside that a shift is fitted to


class Shift(NamedTuple):
    """How far an edit lies off, in pixels, and the correlation of both pictures outside before and after."""

    right: float
    down: float
    before: float
    after: float


class Level(NamedTuple):
    """The source's luma (H, W), the edit (H, W, 3) and the outside (H, W) bool at a size of 1 / scale."""

    scale: int
    source: Tensor
    edited: Tensor
    outside: Tensor


def shifted_back(picture: Tensor, right: float, down: float) -> Tensor:
    """The picture moved so that a content that lay (right, down) pixels off lies in its place: A(p) = E(p + s).

    Separable Lanczos interpolation with radius a = 4, L(x) = sinc(x) sinc(x / a) (Duchon 1979; Turkowski, Graphics Gems
    1990), the taps scaled to sum to 1. Whole pixels are moved without a change of value. Border pixels are repeated.
    """
    for axis, offset in ((1, right), (0, down)):
        whole = math.floor(offset)
        taps = {whole + k: tap for k, tap in lanczos_taps(offset - whole).items()}
        picture = neighbours(picture, axis, whole) if len(taps) == 1 else convolved(picture, axis, taps)
    return picture


def neighbours(picture: Tensor, axis: int, offset: int) -> Tensor:
    """Every pixel's neighbour `offset` pixels further along an axis; the border pixel beyond the border."""
    last = picture.shape[axis] - 1
    positions = (torch.arange(last + 1, device=picture.device) + offset).clamp(0, last)
    return picture.index_select(axis, positions)


def convolved(picture: Tensor, axis: int, taps: dict[int, float]) -> Tensor:
    """sum_k taps[k] p(x + k) along an axis, border pixels repeated."""
    total = torch.zeros_like(picture)
    for offset, tap in taps.items():
        pause()
        total.add_(neighbours(picture, axis, offset), alpha=tap)
    return total


def lanczos_taps(fraction: float, radius: int = LANCZOS_RADIUS) -> dict[int, float]:
    """Weights of the neighbours k of a point `fraction` (0 to 1) behind pixel 0; a single 1 at a fraction of 0."""
    if fraction == 0:
        return {0: 1.0}
    x = torch.arange(1 - radius, radius + 1, dtype=torch.float64) - fraction
    taps = torch.sinc(x) * torch.sinc(x / radius)
    return dict(zip(range(1 - radius, radius + 1), (taps / taps.sum()).tolist(), strict=True))


def luma(picture: Tensor) -> Tensor:
    """BT.709 luma of the picture's first three channels, (H, W, C) -> (H, W)."""
    return sum(weight * picture[..., i] for i, weight in enumerate(LUMA))


def masked_correlation(first: Tensor, second: Tensor, mask: Tensor, reach: tuple[int, int]) -> Tensor:
    """Correlation coefficient of first(p) and second(p + s) over the p and p + s in the mask, for every shift s.

    The masked normalised cross-correlation of Padfield 2012 (IEEE TIP 21(5)); with N = m x m, A = (f m) x m,
    B = m x (g m) and x the cross-correlation:
        r = ((f m) x (g m) - A B / N) / sqrt(((f^2 m) x m - A^2 / N) (m x (g^2 m) - B^2 / N))

    first, second (H, W), mask (H, W) of 0 and 1, reach (down, right) in pixels -> (2 down + 1, 2 right + 1) in float64,
    s = 0 in the middle. Shifts that leave less than half of the mask, and flat overlaps, get -1.
    """
    m = mask.double()
    f, g = ((t.double() - t.double()[mask > 0].mean()) * m for t in (first, second))
    size = [side + margin for side, margin in zip(m.shape, reach, strict=True)]
    spectra = [torch.fft.rfft2(t, s=size) for t in (m, f, g, f * f, g * g)]
    M, F1, G1, F2, G2 = spectra

    def correlate(a: Tensor, b: Tensor) -> Tensor:
        full = torch.fft.irfft2(a.conj() * b, s=size)
        for axis, margin in enumerate(reach):
            full = torch.roll(full, margin, axis).narrow(axis, 0, 2 * margin + 1)
        return full

    count = correlate(M, M).clamp_min(1e-9)
    a, b = correlate(F1, M), correlate(M, G1)
    spread = (correlate(F2, M) - a * a / count).clamp_min(0) * (correlate(M, G2) - b * b / count).clamp_min(0)
    found = (correlate(F1, G1) - a * b / count) / spread.sqrt().clamp_min(1e-12)
    usable = (count >= 0.5 * m.sum()) & (spread.sqrt() > count * (0.1 * LEVEL) ** 2)
    return torch.where(usable, found.clamp(-1, 1), -1.0)


def best_whole_shift(source: Tensor, edited: Tensor, outside: Tensor) -> tuple[float, float]:
    """(right, down) of the highest masked correlation; of equal ones the nearest to no shift at all."""
    reach = tuple(side // SEARCHED for side in source.shape)
    score = masked_correlation(source, edited, outside, reach)
    down, right = (torch.arange(-r, r + 1, dtype=score.dtype, device=score.device) for r in reach)
    far = (down[:, None].square() + right.square()) / (reach[0] ** 2 + reach[1] ** 2 + 1)
    row, column = divmod(int((score - 1e-4 * far).argmax()), score.shape[1])
    return float(column - reach[1]), float(row - reach[0])


class Step(NamedTuple):
    """A Gauss-Newton step in pixels, and the mixture of the edit's channels (C) that looks like the source's luma."""

    right: float
    down: float
    mixture: Tensor


def shift_step(source: Tensor, moved: Tensor, mixture: Tensor, region: Tensor) -> Step:
    """One Gauss-Newton step towards the shift that is left between the source and an edit already moved.

    min over a, b, d of sum rho(a . W + b + d . grad(a' . W) - S): the brightness-constancy equation of Lucas and Kanade
    1981, where a mixture a of the edit's channels and an offset b are estimated along with d, so that no tint is taken
    for a shift; a' is the mixture before the step. rho is Tukey's biweight by reweighted least squares, its scale from
    the pixels that are steeper than the mean (in a picture with much flat ground the others would make every edge an
    outlier). Gradients are central differences. Each unknown is drawn to where it was with the weight of one
    8-bit step, so that d stays 0 along an axis that the picture does not vary on.

    source S (H, W), moved W (H, W, C), mixture a' (C), region (H, W) bool.
    """
    mixed = moved @ mixture.to(moved)
    right = (torch.roll(mixed, -1, 1) - torch.roll(mixed, 1, 1)) / 2
    down = (torch.roll(mixed, -1, 0) - torch.roll(mixed, 1, 0)) / 2
    places = sampled(region, SAMPLES)
    known = torch.stack([t.flatten()[places] for t in (right, down, torch.ones_like(mixed), *moved.unbind(-1))], 1)
    known, wanted = known.double(), (source - mixed).flatten()[places].double()
    ridge = LEVEL**2 * len(wanted) * torch.eye(known.shape[1]).to(known)
    ridge[2, 2] = 0
    energy = known[:, :2].square().sum(1)
    steep = energy >= energy.mean()
    rest = wanted - wanted.median()
    for _ in range(3):
        weighted = known * biweight(rest.abs(), steep)[:, None]
        found = torch.linalg.solve(weighted.T @ known + ridge, weighted.T @ wanted)
        rest = known @ found - wanted
    return Step(found[0].item(), found[1].item(), mixture + found[3:].to(mixture))


def estimate_shift(source: Tensor, edited: Tensor, outside: Tensor) -> Shift | None:
    """The one shift of the whole edit, from the pixels outside the mask; None where too few of them are left.

    Gauss-Newton steps on a longest side of at most 512 pixels, begun at the highest masked correlation and at no shift;
    the better end is followed to at most 1024 pixels. source, edited (H, W, 3), outside (H, W) bool.
    """
    levels = [level for level in pyramid(source, edited, outside) if int(region_of(level.outside).sum()) >= FEWEST]
    if not levels:
        return None
    coarsest = levels[-1]
    starts = {(0.0, 0.0), best_whole_shift(coarsest.source, luma(coarsest.edited), coarsest.outside)}
    ends = [refined(coarsest, Step(*start, edited.new_tensor(LUMA))) for start in sorted(starts)]
    found = max(ends, key=lambda end: agreement(coarsest, end, end))
    finest, ratio = levels[0], coarsest.scale / levels[0].scale
    finest = finest._replace(edited=(finest.edited @ found.mixture)[..., None])  # one channel from here on
    found = Step(found.right * ratio, found.down * ratio, torch.ones_like(found.mixture[:1]))
    found = refined(finest, found) if ratio > 1 else found
    still = found._replace(right=0.0, down=0.0)
    before, after = (agreement(finest, step, found) for step in (still, found))
    return Shift(found.right * finest.scale, found.down * finest.scale, before, after)


def agreement(level: Level, step: Step, region_at: Step) -> float:
    """Correlation outside of the source and the edit moved back by `step`; 0 where too few pixels are left.

    region_at: the step that says which pixels are compared.
    """
    region = region_of(level.outside, region_at.right, region_at.down)
    if int(region.sum()) < FEWEST:
        return 0.0
    mixed = shifted_back(level.edited @ step.mixture.to(level.edited), step.right, step.down)
    return correlation(level.source[region], mixed[region])


def refined(level: Level, start: Step) -> Step:
    """Gauss-Newton steps from a start until they are shorter than a thousandth of a pixel.

    A walk of more than two pixels has lost its way: the start is returned.
    """
    found = start
    for _ in range(10):
        region = region_of(level.outside, found.right, found.down)
        if int(region.sum()) < FEWEST:
            return start
        moved = shifted_back(level.edited, found.right, found.down)
        right, down, mixture = shift_step(level.source, moved, found.mixture, region)
        found = Step(found.right + right, found.down + down, mixture)
        if math.dist(start[:2], found[:2]) > 2:
            return start
        if math.hypot(right, down) < 1e-3:
            break
    return found


def region_of(outside: Tensor, right: float = 0.0, down: float = 0.0) -> Tensor:
    """The pixels outside (H, W) bool that are compared: up to three neighbours on each side must be outside and in the
    frame as well, where the pixel lies in the source and where it lies in the edit.
    """
    kept = F.max_pool2d((~outside).float()[None], 7, 1, 3)[0] == 0
    kept = kept & shifted_back(kept, round(right), round(down))
    for axis, offset in ((0, down), (1, right)):
        margin = min(3 + math.ceil(abs(offset)), kept.shape[axis])
        for start in (0, kept.shape[axis] - margin):
            kept.narrow(axis, start, margin).fill_(False)
    return kept


def pyramid(source: Tensor, edited: Tensor, outside: Tensor) -> list[Level]:
    """Both pictures and the outside, halved again and again, the sizes from FINE to COARSE pixels, finest first.

    A pixel of a smaller picture is outside if all of its pixels are. Every size is smoothed by (1 4 6 4 1) / 16 along
    both axes, without which the finest texture has no usable gradient.
    """
    levels = [Level(1, luma(source), edited, outside)]
    while max(levels[-1].source.shape) > COARSE and min(levels[-1].source.shape) >= 32:
        pause()
        scale, bright, coloured, allowed = levels[-1]
        inside = F.max_pool2d((~allowed).float()[None], 2)[0] > 0
        bright = F.avg_pool2d(bright[None], 2)[0]
        coloured = F.avg_pool2d(coloured.movedim(-1, 0), 2).movedim(0, -1)
        levels.append(Level(2 * scale, bright, coloured, ~inside))
    kept = [level for level in levels if max(level.source.shape) <= FINE] or levels[-1:]
    return [Level(scale, smoothed(bright[..., None])[..., 0], smoothed(edit), out) for scale, bright, edit, out in kept]


def smoothed(picture: Tensor) -> Tensor:
    """A picture (H, W, C) convolved with (1 4 6 4 1) / 16 along both axes, border pixels repeated."""
    return convolved(convolved(picture, 0, BINOMIAL), 1, BINOMIAL)
