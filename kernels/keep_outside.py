"""Compositing an edit into its original: weights of a mask, shift and colour of the edit, the mixture itself.

Pictures are (H, W, C), masks and weights (H, W) in 0..1. A shift (right, down) in pixels says how far the edit's
content lies off the original's: E(x, y) = O(x - right, y - down).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from scipy import ndimage

if TYPE_CHECKING:
    from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709-6, item 3.2
LANCZOS_RADIUS = 4
COARSE, FINE = 512, 1024  # longest side in pixels on which a shift is searched, and on which it is refined
SEARCHED = 8  # shifts of up to 1 / SEARCHED of each side are found
SAMPLES = 2**18  # pixels outside that a shift is fitted to
FEWEST = 256  # pixels outside below which nothing is estimated
TUKEY = 4.685  # cut-off of the biweight in standard deviations, 95 % efficient for Gaussian errors
MAD_TO_STD = 1.4826
LEVEL = 1 / 255  # one step of an 8-bit picture


# -------------------------------------------------------------------------------------------------------- the weights


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Grow a soft mask by a disc: the largest value within `radius` pixels, (H, W) -> (H, W).

    D(p) = max m(p + q) over q with |q|^2 <= r^2, as rows of the disc whose maxima come from windows of doubling width;
    about 4 r comparisons a pixel. Beyond the border lies nothing.
    """
    height, width = mask.shape
    table = F.pad(mask, (radius,) * 4, value=-math.inf)
    window, grown = 1, torch.full_like(mask, -math.inf)
    for row in range(radius, -1, -1):
        half = math.isqrt(radius * radius - row * row)
        while 2 * window <= 2 * half + 1:
            table = torch.maximum(table[:, :-window], table[:, window:])
            window *= 2
        left, right = radius - half, radius + half - window + 1
        widest = torch.maximum(table[:, left : left + width], table[:, right : right + width])
        for top in {radius - row, radius + row}:
            torch.maximum(grown, widest[top : top + height], out=grown)
    return grown


def grow(mask: Tensor, pixels: int) -> Tensor:
    """dilate for positive `pixels`; for negative ones the white shrinks, -D(-m), but not from the picture's border."""
    return dilate(mask, pixels) if pixels >= 0 else -dilate(-mask, -pixels)


def distance_to_outside(mask: Tensor) -> Tensor:
    """Euclidean distance in pixels from each pixel to the nearest one where the mask is 0; infinite if there is none.

    (H, W) -> (H, W) float32 on the mask's device; exact (scipy.ndimage.distance_transform_edt, on the CPU).
    """
    inside = mask > 0
    if bool(inside.all()):
        return torch.full(mask.shape, math.inf, device=mask.device)
    return torch.from_numpy(ndimage.distance_transform_edt(inside.cpu().numpy())).to(mask.device, torch.float32)


def feather_ramp(distance: Tensor, width: float) -> Tensor:
    """Weight of the edit at a distance d in pixels from the outside: 0 at d = 0 and 1 beyond `width`.

    t = min(d / (width + 1), 1),  w = 3 t^2 - 2 t^3
    the cubic Hermite step, level at both ends. A width of 0 gives 1 to every pixel that is not outside (d >= 1).
    """
    share = (distance / (width + 1)).clamp(0, 1)
    return share * share * (3 - 2 * share)


def mix(original: Tensor, edited: Tensor, weights: Tensor) -> Tensor:
    """o + w (e - o); where w = 0 the original and where w = 1 the edit, bit for bit. (H, W, C), weights (H, W)."""
    w = weights[..., None]
    mixed = original + w * (edited - original)
    return torch.where(w == 0, original, torch.where(w == 1, edited, mixed))


# ---------------------------------------------------------------------------------------------------------- the shift


class Shift(NamedTuple):
    """How far an edit lies off, in pixels, and the correlation of both pictures outside before and after."""

    right: float
    down: float
    before: float
    after: float


class Level(NamedTuple):
    """The original's luma (H, W), the edit (H, W, 3) and the outside (H, W) bool at a size of 1 / scale."""

    scale: int
    original: Tensor
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


def best_whole_shift(original: Tensor, edited: Tensor, outside: Tensor) -> tuple[float, float]:
    """(right, down) of the highest masked correlation; of equal ones the nearest to no shift at all."""
    reach = tuple(side // SEARCHED for side in original.shape)
    score = masked_correlation(original, edited, outside, reach)
    down, right = (torch.arange(-r, r + 1, dtype=score.dtype, device=score.device) for r in reach)
    far = (down[:, None].square() + right.square()) / (reach[0] ** 2 + reach[1] ** 2 + 1)
    row, column = divmod(int((score - 1e-4 * far).argmax()), score.shape[1])
    return float(column - reach[1]), float(row - reach[0])


class Step(NamedTuple):
    """A Gauss-Newton step in pixels, and the mixture of the edit's channels (C) that looks like the original's luma."""

    right: float
    down: float
    mixture: Tensor


def shift_step(original: Tensor, moved: Tensor, mixture: Tensor, region: Tensor) -> Step:
    """One Gauss-Newton step towards the shift that is left between the original and an edit already moved.

    min over a, b, d of sum rho(a . W + b + d . grad(a' . W) - O): the brightness-constancy equation of Lucas and Kanade
    1981, where a mixture a of the edit's channels and an offset b are estimated along with d, so that no tint is taken
    for a shift; a' is the mixture before the step. rho is Tukey's biweight by reweighted least squares, its scale from
    the pixels that are steeper than the mean (in a picture with much flat ground the others would make every edge an
    outlier). Gradients are central differences. Each unknown is drawn to where it was with the weight of one
    8-bit step, so that d stays 0 along an axis that the picture does not vary on.

    original O (H, W), moved W (H, W, C), mixture a' (C), region (H, W) bool.
    """
    mixed = moved @ mixture.to(moved)
    right = (torch.roll(mixed, -1, 1) - torch.roll(mixed, 1, 1)) / 2
    down = (torch.roll(mixed, -1, 0) - torch.roll(mixed, 1, 0)) / 2
    places = sampled(region)
    known = torch.stack([t.flatten()[places] for t in (right, down, torch.ones_like(mixed), *moved.unbind(-1))], 1)
    known, wanted = known.double(), (original - mixed).flatten()[places].double()
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


def estimate_shift(original: Tensor, edited: Tensor, outside: Tensor) -> Shift | None:
    """The one shift of the whole edit, from the pixels outside the mask; None where too few of them are left.

    Gauss-Newton steps on a longest side of at most 512 pixels, begun at the highest masked correlation and at no shift;
    the better end is followed to at most 1024 pixels. original, edited (H, W, 3), outside (H, W) bool.
    """
    levels = [level for level in pyramid(original, edited, outside) if int(region_of(level.outside).sum()) >= FEWEST]
    if not levels:
        return None
    coarsest = levels[-1]
    starts = {(0.0, 0.0), best_whole_shift(coarsest.original, luma(coarsest.edited), coarsest.outside)}
    ends = [refined(coarsest, Step(*start, edited.new_tensor(LUMA))) for start in sorted(starts)]
    found = max(ends, key=lambda end: agreement(coarsest, end, end))
    finest, ratio = levels[0], coarsest.scale / levels[0].scale
    finest = finest._replace(edited=(finest.edited @ found.mixture)[..., None])  # one channel from here on
    found = Step(found.right * ratio, found.down * ratio, torch.ones_like(found.mixture[:1]))
    found = refined(finest, found) if ratio > 1 else found
    still = found._replace(right=0.0, down=0.0)
    before, after = (agreement(finest, step, found) for step in (still, found))
    return Shift(found.right * finest.scale, found.down * finest.scale, before, after)


def sampled(region: Tensor, most: int = SAMPLES) -> Tensor:
    """Flat indices of the pixels of a region, every n-th if they are more than `most`."""
    places = region.flatten().nonzero()[:, 0]
    return places[:: max(1, -(-len(places) // most))]


def agreement(level: Level, step: Step, region_at: Step) -> float:
    """Correlation outside of the original and the edit moved back by `step`; 0 where too few pixels are left.

    region_at: the step that says which pixels are compared.
    """
    region = region_of(level.outside, region_at.right, region_at.down)
    if int(region.sum()) < FEWEST:
        return 0.0
    mixed = shifted_back(level.edited @ step.mixture.to(level.edited), step.right, step.down)
    return correlation(level.original[region], mixed[region])


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
        right, down, mixture = shift_step(level.original, moved, found.mixture, region)
        found = Step(found.right + right, found.down + down, mixture)
        if math.dist(start[:2], found[:2]) > 2:
            return start
        if math.hypot(right, down) < 1e-3:
            break
    return found


def region_of(outside: Tensor, right: float = 0.0, down: float = 0.0) -> Tensor:
    """The pixels outside (H, W) bool that are compared: up to three neighbours on each side must be outside and in the
    frame as well, where the pixel lies in the original and where it lies in the edit.
    """
    kept = F.max_pool2d((~outside).float()[None], 7, 1, 3)[0] == 0
    kept = kept & shifted_back(kept, round(right), round(down))
    for axis, offset in ((0, down), (1, right)):
        margin = min(3 + math.ceil(abs(offset)), kept.shape[axis])
        for start in (0, kept.shape[axis] - margin):
            kept.narrow(axis, start, margin).fill_(False)
    return kept


def pyramid(original: Tensor, edited: Tensor, outside: Tensor) -> list[Level]:
    """Both pictures and the outside, halved again and again, the sizes from FINE to COARSE pixels, finest first.

    A pixel of a smaller picture is outside if all of its pixels are. Every size is smoothed by (1 4 6 4 1) / 16 along
    both axes, without which the finest texture has no usable gradient.
    """
    levels = [Level(1, luma(original), edited, outside)]
    while max(levels[-1].original.shape) > COARSE and min(levels[-1].original.shape) >= 32:
        scale, bright, coloured, allowed = levels[-1]
        inside = F.max_pool2d((~allowed).float()[None], 2)[0] > 0
        bright = F.avg_pool2d(bright[None], 2)[0]
        coloured = F.avg_pool2d(coloured.movedim(-1, 0), 2).movedim(0, -1)
        levels.append(Level(2 * scale, bright, coloured, ~inside))
    kept = [level for level in levels if max(level.original.shape) <= FINE] or levels[-1:]
    return [Level(scale, smoothed(bright[..., None])[..., 0], smoothed(edit), out) for scale, bright, edit, out in kept]


def smoothed(picture: Tensor) -> Tensor:
    """A picture (H, W, C) convolved with (1 4 6 4 1) / 16 along both axes, border pixels repeated."""
    binomial = {-2: 1 / 16, -1: 4 / 16, 0: 6 / 16, 1: 4 / 16, 2: 1 / 16}
    return convolved(convolved(picture, 0, binomial), 1, binomial)


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation coefficient of two lists of values; 0 where one is constant."""
    a, b = (t.double() - t.double().mean() for t in (first, second))
    spread = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / spread if spread > 1e-12 else 0.0


# --------------------------------------------------------------------------------------------------------- the colour

ColourMap = tuple["Tensor", "Tensor"]
ColourFit = Callable[["Tensor", "Tensor", "Tensor"], ColourMap]


def recolour(colours: Tensor, fitted: ColourMap) -> Tensor:
    """c' = A c + b for colours (..., 3), with A (3, 3) and b (3)."""
    matrix, offset = (t.to(colours) for t in fitted)
    return colours @ matrix.T + offset


def recolour_within(colours: Tensor, fitted: ColourMap, seen: Tensor) -> Tensor:
    """recolour, but no channel changes by more than it does for any of the colours seen (P, 3).

    So a map is not carried on to colours far from those that it was made from.
    """
    change = recolour(seen, fitted) - seen
    low, high = change.amin(0).to(colours), change.amax(0).to(colours)
    return colours + (recolour(colours, fitted) - colours).clamp(low, high)


def fit_nothing(edited: Tensor, original: Tensor, weights: Tensor) -> ColourMap:
    """A = 1, b = 0."""
    return torch.eye(3).to(edited), torch.zeros(3).to(edited)


def fit_mean(edited: Tensor, original: Tensor, weights: Tensor) -> ColourMap:
    """The offset between the weighted means: A = 1, b = mean(o) - mean(e). Colours (P, 3), weights (P)."""
    return torch.eye(3).to(edited), weighted_mean(original, weights) - weighted_mean(edited, weights)


def fit_mean_and_spread(edited: Tensor, original: Tensor, weights: Tensor) -> ColourMap:
    """Mean and standard deviation of each channel, c' = (std_o / std_e) (c - mean_e) + mean_o.

    Reinhard and others 2001, "Color Transfer between Images", eq. 10 and 11, in the picture's own RGB instead of
    l-alpha-beta: an edit's tint and contrast act on these. Variances get one squared 8-bit step added, so that a flat
    channel keeps its contrast.
    """
    mean_o, mean_e = weighted_mean(original, weights), weighted_mean(edited, weights)
    spread_o = weighted_mean((original - mean_o).square(), weights)
    spread_e = weighted_mean((edited - mean_e).square(), weights)
    gain = ((spread_o + LEVEL**2) / (spread_e + LEVEL**2)).sqrt()
    return torch.diag(gain), mean_o - gain * mean_e


def fit_linear(edited: Tensor, original: Tensor, weights: Tensor) -> ColourMap:
    """The affine map of least weighted squares, min sum w |A e + b - o|^2 + P sigma^2 |A - 1|^2.

    sigma is one 8-bit step: along colours that do not occur outside, the map changes nothing.
    """
    mean_o, mean_e = weighted_mean(original, weights), weighted_mean(edited, weights)
    x, y = edited - mean_e, (original - mean_o) - (edited - mean_e)
    weighted = x * weights[:, None]
    ridge = LEVEL**2 * weights.sum() * torch.eye(3).to(x)
    matrix = torch.linalg.solve(weighted.T @ x + ridge, weighted.T @ y).T + torch.eye(3).to(x)
    return matrix, mean_o - matrix @ mean_e


def fit_robustly(fit: ColourFit, edited: Tensor, original: Tensor) -> ColourMap:
    """A colour fit that a minority of pixels which differ for another reason cannot draw aside.

    Iteratively reweighted least squares with Tukey's biweight (Beaton and Tukey 1974), 15 rounds. Colours (P, 3) of the
    same places; in float64.
    """
    e, o = edited.double(), original.double()
    weights = torch.ones_like(e[:, 0])
    for _ in range(15):
        fitted = fit(e, o, weights)
        weights = biweight((recolour(e, fitted) - o).norm(dim=1))
    return fitted


def held_out_error(fit: ColourFit, edited: Tensor, original: Tensor, halves: list[Tensor]) -> float:
    """Mean absolute error of a robust fit on pixels that it was not made from.

    halves: (P) bool each; every one of them and every complement is left out once.
    """
    errors = []
    for half in [*halves, *(~half for half in halves)]:
        fitted = fit_robustly(fit, edited[~half], original[~half])
        errors.append((recolour(edited[half].double(), fitted) - original[half]).abs().mean().item())
    return sum(errors) / len(errors)


def biweight(residuals: Tensor, typical: Tensor | None = None) -> Tensor:
    """(1 - (r / (c s))^2)^2 within c s, else 0, with s = 1.4826 median(r) and at least an eighth of an 8-bit step.

    residuals (P), not negative; typical (P) bool: the ones the median is taken of.
    """
    median = (residuals if typical is None else residuals[typical]).median()
    scale = (MAD_TO_STD * median).clamp_min(LEVEL / 8)
    return (1 - (residuals / (TUKEY * scale)).square()).clamp_min(0).square()


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum w v / sum w over the first dimension, values (P, 3), weights (P) -> (3)."""
    return (values * weights[:, None]).sum(0) / weights.sum()
