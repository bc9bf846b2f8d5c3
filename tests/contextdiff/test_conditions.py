"""Classes and layouts in the place of the text (section 4.3): the maps, the residual blocks, the node, its ways."""

import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from contextdiff.acting import Colours, adapter, use_folder, vision
from contextdiff.test_kinds import norm, randn, train, unet
from contextdiff.test_trajectory import edit, invert, relative
from palimpsest.kernels.contextdiff_conditions import class_map, nearest_colours, part_shares
from palimpsest.nodes.contextdiff.adapter import describe
from palimpsest.nodes.contextdiff.condition import KEY, joined
from palimpsest.nodes.contextdiff.condition_network import ConditionEncoder, ResidualBlock
from palimpsest.nodes.contextdiff.condition_node import ContextCondition
from palimpsest.nodes.contextdiff.config import AdapterConfig
from palimpsest.nodes.contextdiff.layers import positions
from palimpsest.nodes.contextdiff.network import build, initialise
from palimpsest.nodes.contextdiff.nodes import ContextSampler, LoadContextAdapter, SaveContextAdapter
from palimpsest.nodes.contextdiff.sight import Sight

TEXT = tiny_models.SD15["context_dim"]
PALETTE = "#000000 #ff0000 #0000ff"
LAYOUT, CLASS = {"reads": "layout", "labels": 3}, {"reads": "class", "labels": 5}

pytestmark = pytest.mark.usefixtures("inference")


def layout(column=32, height=64, width=64):
    """Red on the left, blue on the right of a column, black below."""
    picture = torch.zeros(1, height, width, 3)
    picture[:, : height // 2, :column, 0] = 1
    picture[:, : height // 2, column:, 2] = 1
    return picture


def given(seed=1, **chosen):
    """A prompt with a layout or a class behind it."""
    return tiny_models.execute(ContextCondition, positive=tiny_models.prompt(seed), **chosen)[0]


def with_layout(column=32, seed=1):
    return given(seed, layout=layout(column), palette=PALETTE)


def with_class(label="3", seed=1):
    return given(seed, kind="class", label=label, labels=5)


# ---- the maps


def test_each_pixel_is_of_the_nearest_colour_in_float64():
    picture, palette = torch.rand(2, 5, 7, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    parts, distance = nearest_colours(picture, palette)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(7)):
        each = [((picture[tuple(place)] - colour) ** 2).sum() ** 0.5 for colour in palette]
        assert int(parts[tuple(place)]) == min(range(4), key=lambda k: each[k])
        torch.testing.assert_close(distance[tuple(place)], min(each))


def test_shares_are_the_means_over_cells_and_sum_to_1():
    parts = torch.randint(3, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    shares = part_shares(parts, 3, 4)
    for k in range(3):
        wanted = [
            [(parts[1, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3] == k).float().mean() for c in range(4)] for r in range(4)
        ]
        torch.testing.assert_close(shares[1, k], torch.tensor(wanted))
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, 4))
    torch.testing.assert_close(part_shares(parts[:, :5, :7], 3, 4).sum(1), torch.ones(2, 4, 4))


def test_a_class_is_one_cell():
    assert class_map(torch.tensor([2, 0]), 3).flatten(1).tolist() == [[0, 0, 1], [1, 0, 0]]


# ---- the residual blocks


def conv(x, layer):
    """A convolution with zeros around, cell by cell."""
    kernel = layer.weight.shape[-1]
    around = torch.nn.functional.pad(x, (kernel // 2,) * 4)
    rows, columns = x.shape[-2:]
    out = torch.zeros(len(x), len(layer.weight), rows, columns, dtype=x.dtype)
    for r in range(rows):
        for c in range(columns):
            seen = around[:, :, r : r + kernel, c : c + kernel]
            out[..., r, c] = torch.einsum("bikl,oikl->bo", seen, layer.weight) + layer.bias
    return out


def grouped(x, layer):
    """Group norm, written out."""
    groups = x.unflatten(1, (layer.num_groups, -1)).flatten(2)
    mean = groups.mean(-1, keepdim=True)
    groups = (groups - mean) / ((groups - mean).pow(2).mean(-1, keepdim=True) + layer.eps).sqrt()
    return groups.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


def silu(x):
    return x / (1 + (-x).exp())


def encoder(config):
    """A ConditionEncoder in float64 all of whose numbers are random."""
    net = build(AdapterConfig("SD15", 4, TEXT, width=32, depth=1, heads=4, **config)).condition
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    return net


@pytest.mark.parametrize(("config", "side"), [(LAYOUT, 8), (CLASS, 1)])
def test_the_encoder_is_its_equation_in_float64(config, side):
    net, context = encoder(config), randn(2, config["labels"], side, side)
    assert isinstance(net, ConditionEncoder) and all(isinstance(block, ResidualBlock) for block in net.residual)
    h = conv(context, net.stem)
    for number, block in enumerate(net.residual):
        if number and side > 1:
            h = h.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3))
        h = h + conv(silu(grouped(conv(silu(grouped(h, block.norm1)), block.conv1), block.norm2)), block.conv2)
    tokens = torch.einsum("bci,oi->bco", norm(h.flatten(2).mT, net.norm), net.widen.weight) + net.widen.bias
    if side > 1:
        tokens = tokens + positions(2, 2, 32, tokens)
    torch.testing.assert_close(net(context), tokens, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [LAYOUT, CLASS, LAYOUT | {"kind": "CLIP of x0_hat", "vision_width": 24}])
def test_an_untrained_one_gives_exactly_zero_and_learns_from_the_first_step(config):
    net = build(AdapterConfig("SD15", 4, TEXT, width=32, depth=1, heads=4, **config))
    initialise(net, 0)
    side = 1 if config is CLASS else 32
    told = torch.rand(2, config["labels"], side, side)
    r = net(torch.randn(2, 4, 8, 8), told, torch.full((2,), 0.5), 1, torch.randn(2, 5, 24))
    assert torch.count_nonzero(r) == 0
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


# ---- the node


def test_the_prompt_stays_and_carries_the_map():
    before = tiny_models.prompt(1)
    found, report = tiny_models.execute(ContextCondition, positive=before, layout=layout(), palette=PALETTE)
    assert torch.equal(found[0][0], before[0][0]) and KEY not in before[0][1]
    assert found[0][1][KEY].shape == (1, 3, 32, 32)
    torch.testing.assert_close(found[0][1][KEY].mean((0, 2, 3)), torch.tensor([0.5, 0.25, 0.25]))
    assert "part 0 50.0 %, part 1 25.0 %, part 2 25.0 %" in report and "far" not in report
    odd = tiny_models.execute(ContextCondition, positive=before, layout=layout() * 0.5, palette=PALETTE)[1]
    assert "50.0 % are far from every colour" in odd
    several = given(kind="class", label="3, 0 2", labels=5)
    assert several[0][1][KEY].argmax(1).flatten().tolist() == [3, 0, 2]
    two = tiny_models.prompt(1) + tiny_models.prompt(2)
    own = tiny_models.execute(ContextCondition, positive=two, kind="class", label="3 0", labels=5)[0]
    assert [int(extra[KEY].argmax(1)) for _, extra in own] == [3, 0]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "kind is layout and no layout is connected"),
        ({"layout": layout(), "palette": "#000000"}, "palette has 1 colours: give 2 to 64, each once"),
        ({"layout": layout(), "palette": "#000000 #00000"}, "palette has '#00000', which is no colour"),
        ({"layout": layout(), "palette": "#00ff00 #00FF00"}, "each once"),
        ({"kind": "class", "label": "5", "labels": 5}, "label has '5': write whole numbers from 0 to 4"),
        ({"kind": "class", "label": "cat"}, "label has 'cat'"),
        ({"kind": "class", "label": ""}, "label has ''"),
    ],
)
def test_what_is_no_class_or_layout_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        given(**chosen)


# ---- sampling


def sampler(made, **settings):
    return tiny_models.execute(ContextSampler, context_adapter=made, **settings)[0]


def drawn(made, positive, **settings):
    return edit(unet(), positive, sampler(made, **settings), {"samples": harness.noise()})[0]


@pytest.mark.parametrize(("config", "one", "other"), [
    (LAYOUT, with_layout, lambda: with_layout(16)), (CLASS, with_class, lambda: with_class("1"))])  # fmt: skip
def test_it_reads_the_map_and_not_the_text(config, one, other):
    made = adapter(unet(), 0.3, **config)
    stock = edit(unet(), one(), comfy.samplers.sampler_object("euler"), {"samples": harness.noise()})[0]
    plain = edit(unet(), tiny_models.prompt(1), comfy.samplers.sampler_object("euler"), {"samples": harness.noise()})[0]
    assert torch.equal(stock, plain), "the model itself reads the text alone"
    assert torch.equal(drawn(made, one(), strength=0.0), plain)
    harness.assert_acts(drawn(made, one()), plain)
    harness.assert_acts(drawn(made, other()), drawn(made, one()))


@pytest.mark.parametrize(("config", "positive"), [(LAYOUT, with_layout), (CLASS, with_class)])
def test_the_sampler_undoes_a_random_adapters_trajectory_to_float_error(config, positive):
    made, latent = adapter(unet(), 0.1, **config), tiny_models.latent()
    trajectory, noise, *_ = invert(unet(), latent, positive(), context_adapter=made, context_refinements=30)
    last, states = edit(unet(), positive(), sampler(made), noise)
    for state, recorded in zip(states, trajectory.latents, strict=True):
        assert relative(state, recorded) < 1e-5
    assert relative(last, latent["samples"]) < 1e-5
    assert relative(invert(unet(), latent, positive())[0].latents[3], trajectory.latents[3]) > 1e-3


@pytest.mark.parametrize(
    ("config", "positive", "message"),
    [
        (LAYOUT, lambda: tiny_models.prompt(1), "reads a layout, and the positive prompt carries none: put Class or"),
        (LAYOUT, with_class, "reads a layout of 3 labels, the prompt carries a class of 5"),
        (CLASS | {"labels": 4}, with_class, "reads a class of 4 labels, the prompt carries a class of 5"),
    ],
)
def test_a_prompt_that_does_not_carry_it_is_refused(config, positive, message):
    with pytest.raises(ValueError, match=message):
        drawn(adapter(unet(), 0.3, **config), positive())


def test_an_adapter_that_reads_text_goes_on_reading_it():
    made = adapter(unet(), 0.3)
    assert torch.equal(drawn(made, with_layout()), drawn(made, tiny_models.prompt(1)))


# ---- training and files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_context."""
    return use_folder(monkeypatch, tmp_path)


@pytest.mark.parametrize(("positive", "reads"), [(with_layout, "layout"), (with_class, "class")])
def test_it_is_trained_saved_and_samples_the_same(folder, positive, reads):
    made = train(2, positive=positive())[0]
    assert made.config.reads == reads
    assert f"a {reads} of {made.config.labels}" in describe(made)
    assert made.weights()["condition.stem.weight"].abs().max() > 0
    fresh = build(made.config)
    initialise(fresh, 0)
    for name in ("condition.stem.weight", "condition.residual.2.conv1.weight", "out.weight"):
        assert not torch.equal(made.weights()[name], fresh.state_dict()[name]), name
    file = tiny_models.execute(SaveContextAdapter, context_adapter=made)[0]
    again = tiny_models.execute(LoadContextAdapter, file=file)[0]
    assert again.config == made.config
    assert torch.equal(drawn(again, positive()), drawn(made, positive()))
    more = train(2, positive=positive(), context_adapter=made)[0]
    assert more.info["steps"] == 2 * made.info["steps"]


def test_through_clip_too():
    eyes = {"clip_vision": vision(), "vae": Colours()}
    made = train(2, positive=with_layout(), adapter="CLIP of x0_hat", **eyes)[0]
    assert (made.config.reads, made.config.kind) == ("layout", "CLIP of x0_hat")
    assert isinstance(made.sight, Sight)
    assert torch.isfinite(drawn(made, with_layout())).all()


def test_each_picture_is_trained_with_its_own():
    several = with_class("3", 1) + with_class("0", 2)
    assert joined(several, 2).argmax(1).flatten().tolist() == [3, 0]
    assert joined(tiny_models.prompt(1), 2) is None
    assert train(2, positive=several)[0].config.labels == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive": with_class("3 0 1")}, "there are 3 classes or layouts for 2 pictures"),
        ({"positive": with_class() + tiny_models.prompt(2)}, "some prompts carry a class or layout and others none"),
        ({"positive": with_class(), "adapter": "released code"}, "reads texts only, it is given a class"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(2, **settings)


def test_an_adapter_that_reads_something_else_is_refused():
    with pytest.raises(ValueError, match="reads a layout and positive brings a text"):
        train(context_adapter=adapter(unet(), **LAYOUT))
    with pytest.raises(ValueError, match="reads a text and positive brings a class"):
        train(context_adapter=adapter(unet()), positive=with_class())
    with pytest.raises(ValueError, match="reads a class of 4 labels, the prompt carries a class of 5"):
        train(context_adapter=adapter(unet(), **CLASS | {"labels": 4}), positive=with_class())
