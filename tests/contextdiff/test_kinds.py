"""The kinds of a context adapter: what they compute, what they see with, files, sampling, inversion, training."""

import functools
import json
from dataclasses import asdict, replace

import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from contextdiff.acting import SEEING, Colours, adapter, use_folder, vision
from contextdiff.test_trajectory import edit, invert, relative
from palimpsest.nodes.contextdiff import validation as context_validation
from palimpsest.nodes.contextdiff.adapter import describe
from palimpsest.nodes.contextdiff.config import CLIP_PREDICTED, CLIP_SOURCE, KINDS, RELEASED, AdapterConfig
from palimpsest.nodes.contextdiff.layers import positions, waves
from palimpsest.nodes.contextdiff.network import build, initialise
from palimpsest.nodes.contextdiff.nodes import ContextSampler, LoadContextAdapter, SaveContextAdapter
from palimpsest.nodes.contextdiff.objective import Objective
from palimpsest.nodes.contextdiff.sight import Sight
from palimpsest.nodes.contextdiff.train_node import TrainContextAdapter

TEXT = tiny_models.SD15["context_dim"]
SIZES = {
    CLIP_PREDICTED: {"vision_width": 24},
    CLIP_SOURCE: {"vision_width": 24},
    RELEASED: {"rows": 8, "columns": 8},
}

pytestmark = pytest.mark.usefixtures("inference")


def network(kind, seed=0, **changes):
    """A network in float64 all of whose numbers are random."""
    config = AdapterConfig(
        "SD15", 4, TEXT, **{"width": 32, "depth": 2, "heads": 8, "kind": kind} | SIZES[kind] | changes
    )
    made, generator = build(config), torch.Generator().manual_seed(seed)
    initialise(made, seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    return made


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(pictures=2, height=8, width=8):
    """clean, text, angle, picture."""
    angle = torch.full((pictures,), 0.4, dtype=torch.float64)
    return randn(pictures, 4, height, width), randn(pictures, 7, TEXT, seed=1), angle, randn(pictures, 5, 24, seed=2)


# ---- what they compute, by hand


def norm(x, layer):
    """LayerNorm, written out."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def attention(asking, context, layer):
    """Attention in 8 heads, head by head and query by query."""
    q, k, v = (linear(x, y).unflatten(-1, (8, -1)) for x, y in (
        (asking, layer.query), (context, layer.key), (context, layer.value)))  # fmt: skip
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for head in range(8):
            for n in range(q.shape[1]):
                logits = torch.stack([(q[b, n, head] * k[b, m, head]).sum() for m in range(k.shape[1])])
                share = (logits / q.shape[-1] ** 0.5).softmax(0)
                out[b, n, head] = (share[:, None] * v[b, :, head]).sum(0)
    return linear(out.flatten(-2), layer.out)


def test_the_cross_modal_network_is_its_equation_in_float64():
    """Image tokens ask text tokens in 8 heads, and the answer is read out at every patch's place."""
    net = network(CLIP_PREDICTED)
    clean, text, angle, picture = given()
    tokens, words = linear(norm(picture, net.norm_image), net.image), linear(norm(text, net.norm_text), net.text)
    level = torch.nn.functional.silu(
        linear(torch.nn.functional.silu(linear(waves(angle, 32), net.level[0])), net.level[2])
    )
    for block in net.blocks:
        shift_cross, scale_cross, shift_mlp, scale_mlp = linear(level, block.film)[:, None].chunk(4, -1)
        tokens = tokens + attention(
            norm(tokens, block.norm_cross) * (1 + scale_cross) + shift_cross, words, block.cross
        )
        inner = norm(tokens, block.norm_mlp) * (1 + scale_mlp) + shift_mlp
        tokens = tokens + linear(torch.nn.functional.gelu(linear(inner, block.widen)), block.narrow)
    places = positions(4, 4, 32, tokens).expand(2, -1, -1)
    places = places + attention(linear(places, net.places), norm(tokens, net.norm_read), net.read)
    patches = linear(norm(places, net.norm_out), net.out).unflatten(1, (4, 4)).unflatten(-1, (4, 2, 2))
    wanted = patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)
    torch.testing.assert_close(net(clean, text, angle, 1, picture), wanted, rtol=1e-9, atol=1e-9)


def test_it_sees_the_picture_the_prompt_and_the_level_and_takes_every_size():
    net = network(CLIP_PREDICTED, video=True)
    clean, text, angle, picture = given(3)
    r = net(clean, text, angle, 3, picture)
    others = (clean, text.flip(-1), angle, 3, picture), (clean, text, angle + 0.1, 3, picture)
    for other in (*others, (clean, text, angle, 3, picture.flip(-1))):
        assert relative(net(*other), r) > 1e-3
    assert torch.equal(net(clean * 2, text, angle, 3, picture), r), "of the latent it takes the shape alone"
    later = picture.clone()
    later[2] += 1
    assert torch.equal(net(clean, text, angle, 3, later)[:2], r[:2]), "no frame sees a later one"
    assert net(randn(3, 4, 7, 9), text, angle, 3, picture).shape == (3, 4, 7, 9)


def test_an_untrained_one_gives_exactly_zero():
    made = adapter(tiny_models.unet(), 0.0, **SEEING)
    clean, text, _, picture = (each.float() for each in given())
    assert torch.count_nonzero(made(clean, text, 0.5, picture)) == 0


def test_the_released_adapter_is_what_four_attention_layers_come_to_in_float64():
    """PyTorch's own MultiheadAttention, as the program stacks it: frames ask one prompt, repeated once a frame."""
    net, frames = network(RELEASED), 3
    clean, text, angle, _ = given(frames)
    text = text[:1].expand(frames, -1, -1)
    layers = [torch.nn.MultiheadAttention(32, 4, dtype=torch.float64) for _ in range(4)]
    last, told = layers[-1], norm(text.mean(1), net.norm_text)
    with torch.no_grad():
        last.in_proj_weight[64:], last.in_proj_bias[64:] = torch.eye(32), net.value.bias
        last.out_proj.weight[:], last.out_proj.bias[:] = net.mix.weight, net.mix.bias
    told = torch.einsum("fi,oi->fo", told, net.value.weight)[:, None]  # (frames, 1, width): frames are the sequence

    def through(pictures):
        for layer in layers:
            pictures = layer(pictures, told, told)[0]
        return norm(linear(pictures[:, 0], net.expand), net.norm_whole).unflatten(1, (4, 8, 8))

    one, other = (through(randn(frames, 1, 32, seed=seed)) for seed in (8, 9))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net(clean, text, angle), one, rtol=1e-9, atol=1e-9)


def test_the_released_adapter_begins_with_size_1_and_is_resampled_for_other_latents():
    made = adapter(tiny_models.unet(), kind=RELEASED, rows=8, columns=8)
    _, text, *_ = (each.float() for each in given())
    r = made(torch.zeros(2, 4, 8, 8), text, 0.5)
    torch.testing.assert_close(r.pow(2).mean((1, 2, 3)).sqrt(), torch.ones(2), rtol=1e-2, atol=0)
    assert made(torch.zeros(2, 4, 12, 7), text, 0.5).shape == (2, 4, 12, 7)
    assert torch.equal(made(torch.ones(2, 4, 8, 8), text, 0.1), r), "neither picture nor level"


# ---- what they see with


def sight(**given):
    return Sight(vision(), Colours(), **given)


def test_clip_sees_what_the_host_shows_it():
    """At a picture of the encoder's own size, whose colours are of 8 bits, the host's own encoding."""
    encoder, pictures = vision(), (torch.rand(2, 28, 28, 3) * 255).round() / 255
    torch.testing.assert_close(Sight(encoder).tokens(pictures), encoder.encode_image(pictures)["last_hidden_state"])


def test_it_sees_the_decoded_prediction_or_the_source():
    model, clean = tiny_models.unet().model, tiny_models.latent(2)["samples"]
    eyes = sight()
    seen = eyes.seen(clean, model.process_latent_out)
    wanted = eyes.tokens(eyes.vae.decode(model.process_latent_out(clean)))
    torch.testing.assert_close(seen, wanted)
    looking = eyes.looking_at(clean)
    assert torch.equal(looking.seen(clean * 0, model.process_latent_out), looking.source)
    assert torch.equal(looking.of_rows([1]).seen(clean, None), looking.source[1:].expand(2, -1, -1))
    with pytest.raises(ValueError, match="looks at 2 source pictures and 3 pictures are sampled"):
        looking.seen(torch.zeros(3, 4, 8, 8), None)


def test_an_encoder_that_wants_other_pictures_is_refused():
    with pytest.raises(ValueError, match="SigLIP 2 of free sizes"):
        Sight(vision(kind="siglip2_vision_model")).tokens(tiny_models.picture())


# ---- sampling and inversion


def acting(kind=CLIP_PREDICTED, random=0.1, **config):
    eyes = sight().looking_at(tiny_models.latent()["samples"]) if kind == CLIP_SOURCE else sight()
    return adapter(tiny_models.unet(), random, sight=eyes, **SEEING | {"kind": kind} | config)


def sampler(made, **settings):
    return tiny_models.execute(ContextSampler, context_adapter=made, **settings)[0]


@pytest.mark.parametrize("kind", [CLIP_PREDICTED, CLIP_SOURCE])
def test_the_sampler_undoes_a_random_adapters_trajectory_to_float_error(kind):
    model, latent, positive = tiny_models.unet(), tiny_models.latent(), tiny_models.prompt(1)
    made = acting(kind)
    trajectory, noise, *_ = invert(model, latent, positive, context_adapter=made, context_refinements=30)
    last, states = edit(model, positive, sampler(made), noise)
    for state, recorded in zip(states, trajectory.latents, strict=True):
        assert relative(state, recorded) < 1e-5
    assert relative(last, latent["samples"]) < 1e-5
    plain = invert(model, latent, positive)[0]
    assert relative(plain.latents[3], trajectory.latents[3]) > 1e-3


def test_at_strength_0_it_is_the_plain_sampler_and_the_encoders_rest():
    model, made = tiny_models.unet(), acting()
    noise = {"samples": harness.noise()}
    stock = comfy.samplers.sampler_object("euler")
    plain = edit(model, tiny_models.prompt(1), stock, noise)[0]
    assert torch.equal(edit(model, tiny_models.prompt(1), sampler(made, strength=0.0), noise)[0], plain)
    assert made.sight.vae.decoded == 0
    harness.assert_acts(edit(model, tiny_models.prompt(1), sampler(made), noise)[0], plain)
    assert made.sight.vae.decoded == 6, "once a step, for both of its levels"
    assert torch.equal(edit(model, tiny_models.prompt(1), stock, noise)[0], plain)


def test_one_without_its_encoders_is_refused_before_anything_is_sampled():
    made = replace(acting(), sight=None)
    with pytest.raises(ValueError, match=r"kind 'CLIP of x0_hat' and has no image encoder here.*clip_vision connected"):
        edit(tiny_models.unet(), tiny_models.prompt(1), sampler(made), {"samples": harness.noise()})


# ---- files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_context."""
    return use_folder(monkeypatch, tmp_path)


def load(made, **encoders):
    name = tiny_models.execute(SaveContextAdapter, context_adapter=made)[0]
    return tiny_models.execute(LoadContextAdapter, file=name, **encoders)


@pytest.mark.parametrize("kind", [CLIP_PREDICTED, CLIP_SOURCE, RELEASED])
def test_what_is_saved_comes_back_with_its_kind_and_samples_the_same(folder, kind):
    source = tiny_models.picture()
    config = {"kind": kind} | SIZES[kind]
    made = adapter(tiny_models.unet(), 0.1, sight=None if kind == RELEASED else sight(), **config)
    again, report = load(made, clip_vision=vision(), vae=Colours(), source=source)
    assert again.config == made.config
    assert describe(made) in report
    if kind == CLIP_SOURCE:
        made = replace(made, sight=replace(made.sight, source=made.sight.tokens(source)))
    noise = {"samples": harness.noise()}
    found = [edit(tiny_models.unet(), tiny_models.prompt(1), sampler(each), noise)[0] for each in (made, again)]
    assert torch.equal(*found)


def test_the_header_of_the_first_kind_is_as_it_was():
    first = AdapterConfig("SD15", 4, TEXT)
    later = {"kind", "vision_width", "rows", "columns", "reads", "labels"}
    assert first.header() == {name: value for name, value in asdict(first).items() if name not in later}
    assert AdapterConfig(**json.loads(json.dumps(first.header()))) == first


@pytest.mark.parametrize(
    ("kind", "encoders", "message"),
    [
        (CLIP_PREDICTED, (), "sees pictures through CLIP's image encoder. Connect clip_vision and vae"),
        (CLIP_PREDICTED, ("clip_vision",), "Connect vae"),
        (CLIP_SOURCE, ("clip_vision", "vae"), "Connect source"),
    ],
)
def test_the_loader_refuses_one_that_cannot_see(folder, kind, encoders, message):
    given = {"clip_vision": vision(), "vae": Colours(), "source": tiny_models.picture()}
    with pytest.raises(ValueError, match=message):
        load(acting(kind), **{name: given[name] for name in encoders})


def test_an_encoder_of_another_width_is_refused(folder):
    other = {"clip_vision": vision(16), "vae": Colours(), "source": tiny_models.picture()}
    with pytest.raises(ValueError, match=r"image encoder of 24 channels, the connected clip_vision has 16"):
        load(acting(CLIP_SOURCE), **other)
    late = load(acting(), **other)[0]
    with pytest.raises(ValueError, match=r"image encoder of 24 channels, the connected clip_vision has 16"):
        edit(tiny_models.unet(), tiny_models.prompt(1), sampler(late), {"samples": harness.noise()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "of mine"}, "kind is one of latent, CLIP of x0_hat.*it is 'of mine'"),
        ({"kind": CLIP_SOURCE}, "vision_width must be from 1 to 16384, it is 0"),
        ({"kind": RELEASED, "rows": 8}, "columns must be from 1 to 1024, it is 0"),
        ({"vision_width": -1}, "vision_width must be from 0"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig("SD15", 4, TEXT, **changes)


# ---- training


@functools.cache
def unet():
    return tiny_models.unet()


def train(pictures=2, **settings):
    """The node's outputs after a few steps, validated at fewer levels than usual."""
    chosen = {
        "model": unet(), "latent": tiny_models.latent(pictures), "positive": tiny_models.prompt(1), "steps": 4,
        "validate_every": 0, "batch_size": 2, "learning_rate": 1e-2, "rescue_filename": "",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_validation, "PROBE_LEVELS", 2)
        patch.setattr(context_validation, "SAMPLED_STEPS", 2)
        return tiny_models.execute(TrainContextAdapter, **chosen | settings)


@pytest.mark.parametrize("kind", [CLIP_PREDICTED, CLIP_SOURCE, RELEASED])
def test_every_kind_learns_and_acts(kind):
    encoder, vae = vision(), Colours()
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    formula = {"formula": "released code", "train_unet": "LoRA on to_q"} if kind == RELEASED else {}
    given = {} if kind == RELEASED else {"clip_vision": encoder, "vae": vae}
    made, _, report, _ = train(3, adapter=kind, positive=tiny_models.prompt(1), **given, **formula)
    assert made.config.kind == kind
    assert "4 steps" in report
    moved = made.weights()["norm_whole.weight" if kind == RELEASED else "out.weight"]
    assert not torch.equal(moved, torch.ones_like(moved)) and torch.count_nonzero(moved)
    assert all(torch.equal(encoder.model.state_dict()[name], tensor) for name, tensor in before.items())
    if kind == CLIP_SOURCE:
        assert vae.decoded == 3, "the pictures are read once"
        made = replace(made, sight=made.sight.of_rows([0]))
    noise = {"samples": harness.noise()}
    stock = edit(unet(), tiny_models.prompt(1), comfy.samplers.sampler_object("euler"), noise)[0]
    ours = edit(unet(), tiny_models.prompt(1), sampler(made), noise)[0]
    assert torch.equal(ours, stock) is (kind == RELEASED), "the released code samples plainly"
    again = train(3, adapter=kind, context_adapter=made, size="large", **given, **formula)[0]
    assert again.config == made.config


def test_each_picture_of_a_step_sees_its_own_source(monkeypatch):
    seen, losses = [], Objective.losses

    def note(self, draw, at):
        seen.append((draw.rows, self.picture(draw, at), self.sight.source))
        return losses(self, draw, at)

    monkeypatch.setattr(Objective, "losses", note)
    train(3, adapter=CLIP_SOURCE, clip_vision=vision(), vae=Colours())
    assert all(torch.equal(tokens.cpu(), source[rows]) for rows, tokens, source in seen)
    assert {row for rows, *_ in seen for row in rows} == {0, 1, 2}


def test_all_attention_learns_where_it_is_asked_to():
    joint = {"train_unet": "LoRA on to_q"}
    queries, every = (train(**joint, **more)[3] for more in ({}, {"trained_with": "all attention"}))
    assert len(every) == 4 * len(queries)
    assert queries.keys() < every.keys()
    assert all(tensor.abs().max() > 0 for name, tensor in every.items() if "to_out_0.lora_up" in name)
    loaded = comfy.sd.load_lora_for_models(unet(), None, every, 1.0, 0.0)[0]
    assert len(loaded.patches) == len(every) / 3


def test_the_defaults_are_the_first_kind():
    made, *_ = train()
    chosen = train(adapter=KINDS[0], trained_with="queries")[0]
    assert made.config.kind == "latent"
    assert all(torch.equal(a, b) for a, b in zip(made.weights().values(), chosen.weights().values(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": CLIP_PREDICTED}, "adapter 'CLIP of x0_hat' sees .*: connect clip_vision and vae, or choose"),
        ({"adapter": CLIP_SOURCE, "vae": Colours()}, "connect clip_vision, or choose"),
        ({"adapter": "mine"}, "adapter"),
        ({"trained_with": "mine"}, "trained_with"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_another_kind_than_the_connected_one_is_refused():
    with pytest.raises(ValueError, match="is of kind 'CLIP of x0_hat' and adapter is 'latent'"):
        train(context_adapter=acting())
    with pytest.raises(ValueError, match="image encoder of 24 channels, the connected clip_vision has 16"):
        train(context_adapter=acting(), adapter=CLIP_PREDICTED, clip_vision=vision(16), vae=Colours())
