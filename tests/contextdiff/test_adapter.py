"""The context adapter: its network, its gradient, how the host manages it, and its file."""

import comfy.model_management
import comfy.ops
import comfy.samplers
import pytest
import tiny_models
import torch
from palimpsest.kernels import contextdiff
from palimpsest.nodes.contextdiff.adapter import ContextAdapter, describe
from palimpsest.nodes.contextdiff.config import SIZES, AdapterConfig
from palimpsest.nodes.contextdiff.layers import attend
from palimpsest.nodes.contextdiff.network import build, closed, initialise
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from torch.utils.flop_counter import FlopCounterMode

TEXT = tiny_models.SD15["context_dim"]
SMALL = {"width": 32, "depth": 2, "heads": 4}


def config(**changes):
    return AdapterConfig("SD15", 4, TEXT, **(SMALL | changes))


def awake(network, seed=0):
    """A network whose layers that start at zero are random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if closed(name.removesuffix(".weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def network(**changes):
    made = build(config(**changes))
    initialise(made, 0)
    return made


def latents(pictures=3, height=8, width=8, seed=0):
    return torch.randn(pictures, 4, height, width, generator=torch.Generator().manual_seed(seed))


def texts(pictures=3, tokens=7, seed=1):
    return torch.randn(pictures, tokens, TEXT, generator=torch.Generator().manual_seed(seed))


def angles(pictures=3, value=0.5):
    return torch.full((pictures,), value)


# ---- the network


@pytest.mark.parametrize("video", [False, True])
def test_an_untrained_adapter_gives_exactly_zero(video):
    r = network(video=video)(latents(), texts(), angles(), 3 if video else 1)
    assert r.shape == latents().shape
    assert torch.count_nonzero(r) == 0


def test_the_same_seed_gives_the_same_weights():
    one, same = (network().state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.isfinite(tensor).all() for tensor in one.values())


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (5, 16)])
def test_it_takes_every_size(patch, size):
    r = awake(network(patch=patch))(latents(2, *size), texts(2), angles(2))
    assert r.shape[-2:] == size
    assert torch.isfinite(r).all()
    assert r.abs().max() > 0


def test_it_looks_at_the_picture_the_prompt_the_level_and_the_place():
    net = awake(network())
    r = net(latents(), texts(), angles())
    for other in (
        net(latents(seed=5), texts(), angles()),
        net(latents(), texts(seed=5), angles()),
        net(latents(), texts(), angles(value=0.6)),
        net(latents().flip(-1), texts(), angles()).flip(-1),
    ):
        assert (r - other).norm() > 1e-3 * r.norm()


def test_without_the_level_it_does_not_depend_on_it():
    net = awake(network(timestep=False))
    assert torch.equal(net(latents(), texts(), angles(value=0.1)), net(latents(), texts(), angles(value=0.9)))


def test_the_order_of_its_words_does_not_matter_but_their_number_may_differ():
    net = awake(network())
    r = net(latents(), texts(), angles())
    torch.testing.assert_close(net(latents(), texts().flip(1), angles()), r)
    torch.testing.assert_close(net(latents(), texts().repeat(1, 2, 1), angles()), r)


def test_its_attention_is_the_equation():
    """softmax(Q K^T / sqrt(d)) V per head, written out."""
    from palimpsest.kernels.kv_inversion import attention

    q, k, v = torch.randn(3, 2, 6, 32).unbind(0)
    torch.testing.assert_close(attend(q, k, v, 4), attention(q, k, v, 4))


def test_a_batch_is_its_pictures_one_by_one():
    net = awake(network())
    together = net(latents(), texts(), angles())
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(net(latents()[row], texts()[row], angles(1)), together[row])


# ---- the video form


def video_from_image():
    """An image network, and a video network of the same weights whose additional layers are untrained."""
    image, video = awake(network()), network(video=True)
    video.load_state_dict(image.state_dict(), strict=False)
    return image, video


def test_the_untrained_video_form_of_a_trained_image_adapter_is_that_adapter():
    image, video = video_from_image()
    assert torch.equal(video(latents(), texts(), angles(), 3), image(latents(), texts(), angles()))


def test_a_frame_sees_itself_and_earlier_frames_only():
    net = awake(network(video=True))
    clip = latents(4)
    before = net(clip, texts(4), angles(4), 4)
    for frame in range(4):
        changed = clip.clone()
        changed[frame] += 1
        moved = [(a - b).abs().max() > 1e-6 for a, b in zip(net(changed, texts(4), angles(4), 4), before, strict=True)]
        assert moved == [i >= frame for i in range(4)]


def test_clips_of_one_batch_do_not_see_each_other():
    net = awake(network(video=True))
    two = net(latents(6), texts(6), angles(6), 3)
    torch.testing.assert_close(two[:3], net(latents(6)[:3], texts(6)[:3], angles(3), 3))
    torch.testing.assert_close(two[3:], net(latents(6)[3:], texts(6)[3:], angles(3), 3))


def test_within_a_frame_every_place_sees_every_other():
    image, video = awake(network(patch=1)), awake(network(patch=1, video=True))
    clean = latents(1)
    changed = clean.clone()
    changed[..., 0, 0] += 1
    far = [
        (net(changed, texts(1), angles(1)) - net(clean, texts(1), angles(1)))[..., -1, -1].abs().max()
        for net in (image, video)
    ]
    assert far[0] < 1e-6 < far[1]


# ---- training on it


def loss_of(net, clean, text):
    """The paper's loss for a denoiser that is not perfect, at one level."""
    sigma = 1.5
    r = net(clean, text, angles(len(clean), contextdiff.noise_angle(sigma)))
    x = contextdiff.contextual_noised(clean, contextdiff.bias_level(sigma) * r, latents(len(clean), seed=9), sigma)
    return contextdiff.context_loss(x / (1 + sigma**2), clean, contextdiff.snr_weight(sigma)).mean()


def test_it_learns_from_its_first_step_on():
    with torch.inference_mode():
        made = ContextAdapter.new(config(depth=1), seed=0)  # as a node that runs in inference mode makes it
    net = made.trainable()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = loss_of(net, latents(), texts())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.count_nonzero(made(latents(), texts(), 0.5)) == 0, "the adapter trained from stays as it was"


def test_its_gradient_is_the_finite_difference():
    net = awake(network(video=True)).double().requires_grad_(True)
    clean, text = latents().double(), texts().double()

    def value():
        return net(clean, text, angles().double(), 3).pow(2).sum()

    value().backward()
    for parameter in (net.blocks[0].cross.query.weight, net.blocks[1].temporal.value.weight, net.patches.weight):
        with torch.no_grad():
            direction = torch.randn_like(parameter)
            parameter += 1e-5 * direction
            up = value()
            parameter -= 2e-5 * direction
            down = value()
            parameter += 1e-5 * direction
        assert ((up - down) / 2e-5).item() == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4)


def test_an_adapter_made_from_a_trained_network_is_that_network():
    net = awake(network()).train()
    wanted = net(latents(), texts(), angles())
    made = ContextAdapter.of(net, {"steps": 3})
    torch.testing.assert_close(made(latents(), texts(), 0.5), wanted)
    assert "steps 3" in describe(made)


# ---- the host's memory management


def sampled(model, adapter, pictures=1):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.prompt(1), tiny_models.prompt(2))
    guider.set_cfg(2.0)
    sampler = tiny_models.execute(ContextSampler, context_adapter=adapter)[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    noise = torch.randn(pictures, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)


def test_it_is_loaded_beside_the_model_in_the_middle_of_a_run(monkeypatch):
    """Both are in the host's list while sampling, and the model was loaded once: bringing the adapter moved nothing."""
    loads, seen = [], []
    with torch.inference_mode():
        model, made = tiny_models.unet(), ContextAdapter.of(awake(network()))
        patch = type(model).patch_model
        monkeypatch.setattr(
            type(model), "patch_model", lambda self, *a, **k: (loads.append(self), patch(self, *a, **k))[1]
        )
        call = ContextAdapter.__call__

        def note(self, *args):
            seen.append({id(loaded.model.model) for loaded in comfy.model_management.current_loaded_models})
            return call(self, *args)

        monkeypatch.setattr(ContextAdapter, "__call__", note)
        first = sampled(model, made)
        assert [sum(p.model is part for p in loads) for part in (model.model, made.patcher.model)] == [1, 1]
        assert seen
        assert all({id(model.model), id(made.patcher.model)} <= there for there in seen)
        assert torch.equal(sampled(model, made), first)


def test_it_asks_for_no_room_but_its_own(monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda *args, **kwargs: (asked.append((args, kwargs)), load(*args))
    )
    made = ContextAdapter.of(network())
    made.load()
    assert asked == [(([made.patcher],), {})]


def test_it_works_again_after_the_host_unloaded_everything():
    with torch.inference_mode():
        model, made = tiny_models.unet(), ContextAdapter.of(awake(network()))
        first = sampled(model, made)
        comfy.model_management.unload_all_models()
        assert torch.equal(sampled(model, made), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_computed_with_in_full(dtype):
    net = awake(network())
    half = build(config(), dtype)
    half.load_state_dict(net.state_dict())
    r, rough = ContextAdapter.of(net)(latents(), texts(), 0.5), ContextAdapter.of(half)(latents(), texts(), 0.5)
    assert rough.dtype == torch.float32
    assert (r - rough).norm() < (0.01 if dtype is torch.float16 else 0.05) * r.norm()
    assert all(p.dtype == dtype for p in half.parameters())


def test_the_output_has_the_latents_dtype():
    made = ContextAdapter.of(awake(network()))
    assert made(latents().to(torch.bfloat16), texts(), 0.5).dtype == torch.bfloat16


# ---- sizes


COUNTED = {  # (size, video): (parameters, multiply-adds a picture) for SD 1.5 at 512 px, as the help page states them
    ("small", False): (1.92e6, 0.93e9),
    ("small", True): (2.97e6, 3.09e9),
    ("medium", False): (5.93e6, 3.01e9),
    ("large", False): (13.55e6, 6.98e9),
}


def shape_of(size, video):
    width, depth = SIZES[size]
    return AdapterConfig("SD15", 4, 768, width, depth, video=video)


@pytest.mark.parametrize(("size", "video"), COUNTED)
def test_sizes_and_cost_are_as_the_help_page_says(size, video):
    net = build(shape_of(size, video), device="meta")
    parameters = sum(p.numel() for p in net.parameters())
    meta = torch.device("meta")
    counter = FlopCounterMode(display=False)
    with counter:
        frames = 8 if video else 1
        text = torch.zeros(frames, 77, 768, device=meta)
        net(torch.zeros(frames, 4, 64, 64, device=meta), text, torch.zeros(frames, device=meta), frames)
    assert parameters == pytest.approx(COUNTED[size, video][0], rel=0.01)
    assert counter.get_total_flops() / 2 / frames == pytest.approx(COUNTED[size, video][1], rel=0.01)


def test_a_config_fits_the_model_it_is_made_for():
    made = AdapterConfig.for_model(tiny_models.unet("sdxl"), 2048, "medium", video=True)
    assert (made.latent_format, made.latent_channels, made.text_width) == ("SDXL", 4, 2048)
    assert (made.width, made.depth, made.patch, made.video) == (384, 3, 4, True)
    assert AdapterConfig.for_model(tiny_models.unet(), 768).patch == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be from 1 to 4096, it is 0"),
        ({"depth": 65}, "depth must be from 1 to 64"),
        ({"width": 30}, "divide by 4 and by its 4 heads, it is 30"),
        ({"patch": 99}, "patch must be"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
