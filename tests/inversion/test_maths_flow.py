"""Flow inversion on an exact velocity field in float64: a mixture of Gaussians in 64 dimensions, in closed form."""

import itertools

import pytest
import torch
from palimpsest.kernels import flow_inversion as maths
from palimpsest.kernels.ddim import ddim_step

DIMENSIONS, PARTS, SHIFT = 64, 6, 3.0
# relative error of a picture after the way up and down, by steps (shift 3)
REACHED = {
    "Euler": {8: 0.3175, 15: 0.2355, 28: 0.1426, 50: 0.1285},
    "Uni-Inv": {8: 0.1130, 15: 0.0526, 28: 0.0192, 50: 0.0058},
    "FireFlow": {8: 0.0284, 15: 0.0089, 28: 0.0026, 50: 0.0008},
}
WAYS = {  # a way up, a way down
    "Euler": (maths.euler_step, maths.euler_step),
    "Uni-Inv": (maths.uni_inv_step, maths.euler_step),
    "FireFlow": (maths.fireflow_step, maths.fireflow_step),
}


class Mixture:
    """x_0 drawn from K diagonal Gaussians: E[x_0 | x_t] and with it the exact velocity; `asked` counts."""

    def __init__(self):
        torch.manual_seed(0)
        draw = {"dtype": torch.float64}
        self.means = torch.randn(PARTS, DIMENSIONS, **draw) * 1.2
        self.variances = torch.rand(PARTS, DIMENSIONS, **draw) * 0.2 + 0.01
        self.shares = torch.log_softmax(torch.randn(PARTS, **draw), 0)
        chosen = torch.multinomial(self.shares.exp(), 64, replacement=True)
        self.pictures = self.means[chosen] + 0.3 * torch.randn(64, DIMENSIONS, **draw)  # not exact samples
        self.asked = 0

    def denoised(self, x, t):
        signal = 1 - t
        spread = signal * signal * self.variances + t * t
        apart = x[:, None] - signal * self.means
        weights = (self.shares - 0.5 * (apart**2 / spread + spread.log()).sum(-1)).softmax(-1)
        return (weights[..., None] * (self.means + signal * self.variances / spread * apart)).sum(1)

    def __call__(self, x, t):
        self.asked += 1
        return maths.velocity_of(x, self.denoised(x, max(t, 1e-9)), max(t, 1e-9))


def levels(steps):
    """Descending, with the shift that SD3 samples with."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return [SHIFT * t / (1 + (SHIFT - 1) * t) for t in even]


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def up_and_down(field, name, steps):
    """(picture, evaluations up, evaluations down)"""
    up, down = WAYS[name]
    noise, before = maths.integrate(up, field, field.pictures, levels(steps)[::-1])[-1], field.asked
    rebuilt = maths.integrate(down, field, noise, levels(steps))[-1]
    return rebuilt, before, field.asked - before


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("steps", [8, 15, 28, 50])
def test_a_picture_comes_back_as_near_as_the_table_says(name, steps):
    field = Mixture()
    rebuilt, up, down = up_and_down(field, name, steps)
    assert relative(rebuilt, field.pictures) == pytest.approx(REACHED[name][steps], abs=1e-4)
    assert (up, down) == {"Euler": (steps, steps), "Uni-Inv": (steps + 1, steps)}.get(name, (steps + 1, steps + 1))


def test_the_default_beats_euler_with_the_hosts_euler_on_the_way_down():
    for steps in (8, 15, 28, 50):
        assert REACHED["Uni-Inv"][steps] < 0.5 * REACHED["Euler"][steps]


def test_fireflow_is_of_second_order_on_a_known_curve():
    """dx/dt = x from 1 to 0: e^-1, and twice the steps are a quarter of the error."""
    start, true = torch.ones(1, dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64).exp()
    errors = [
        relative(
            maths.integrate(maths.fireflow_step, lambda x, t: x, start, [i / n for i in range(n, -1, -1)])[-1], true
        )
        for n in (20, 40)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.6


def test_a_step_of_uni_inv_by_hand():
    """v(x, t) = x t: from x = 2 at 0.5 to 1, last velocity 3: x~ = 3.5, v = 3.5, x' = 3.75."""
    x, last = torch.tensor([2.0]), torch.tensor([3.0])
    stepped, found = maths.uni_inv_step(lambda x, t: x * t, x, last, 0.5, 1.0)
    assert (float(stepped), float(found)) == (3.75, 3.5)


def test_a_step_of_fireflow_by_hand():
    """v(x, t) = x t: from x = 2 at 0.5 to 1, last velocity 4: m = 0.75, x + 0.25 * 4 = 3, v = 2.25, x' = 3.125."""
    x, last = torch.tensor([2.0]), torch.tensor([4.0])
    stepped, found = maths.fireflow_step(lambda x, t: x * t, x, last, 0.5, 1.0)
    assert (float(stepped), float(found)) == (3.125, 2.25)


def test_eulers_step_is_the_hosts_step_in_the_denoised_picture():
    x, clean = torch.randn(2, 3, 16, 5, 7, dtype=torch.float64)
    stepped = maths.euler(x, maths.velocity_of(x, clean, 0.7), 0.7, 0.4)
    assert torch.equal(stepped, ddim_step(x, clean, 0.7, 0.4))


def test_the_velocity_of_a_noised_picture_is_noise_minus_picture():
    clean, noise = torch.randn(2, 1, 16, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(maths.velocity_of(maths.noised(clean, noise, 0.3), clean, 0.3), noise - clean)
    with pytest.raises(ValueError, match="t must be above 0"):
        maths.velocity_of(clean, clean, 0.0)


@pytest.mark.parametrize("name", WAYS)
def test_stored_offsets_bring_the_source_back_exactly(name):
    field, ts = Mixture(), levels(8)
    way = maths.integrate(WAYS[name][0], field, field.pictures, ts[::-1])[::-1]
    x, last, last_of_source = way[0], None, None
    for i, (t, t_next) in enumerate(itertools.pairwise(ts)):
        stepped, last = WAYS[name][1](field, x, last, t, t_next)
        of_source, last_of_source = WAYS[name][1](field, way[i], last_of_source, t, t_next)
        x = maths.with_offset(stepped, of_source, way[i + 1])
    assert relative(x, field.pictures) < 1e-12


def flow_edit(field, target, ts, seed=0):
    clean, generator = field.pictures, torch.Generator().manual_seed(seed)
    edited = clean
    for t, t_next in itertools.pairwise(ts):
        source = maths.noised(clean, torch.randn(clean.shape, generator=generator, dtype=clean.dtype), t)
        asked = maths.coupled(edited, clean, source)
        edited = maths.flow_edit_step(edited, target(asked, t), field(source, t), t, t_next)
    return edited


def test_flow_edit_with_equal_prompts_gives_the_picture_back_bit_for_bit():
    field = Mixture()
    assert torch.equal(flow_edit(field, field, levels(28)[4:]), field.pictures)


def test_flow_edit_moves_pictures_to_the_targets_distribution():
    """The target's parts are the source's, moved by one: so is each picture, noise and all."""
    field, moved = Mixture(), Mixture()
    moved.means = field.means + 1.0
    edited = flow_edit(field, moved, levels(50))
    assert relative(edited, field.pictures + 1.0) < 0.05 < relative(field.pictures, field.pictures + 1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", WAYS)
def test_half_precision_stays_near_float64(name, dtype, tolerance):
    x = torch.randn(3, 16, 5, 13, dtype=torch.float64)
    field = lambda x, t: x * (0.5 + t)  # noqa: E731
    exact = maths.integrate(WAYS[name][1], field, x, [1.0, 0.6, 0.2])[-1]
    half = maths.integrate(WAYS[name][1], field, x.to(dtype), [1.0, 0.6, 0.2])[-1]
    assert half.dtype == dtype
    assert relative(half.double(), exact) < tolerance
