"""The context adapter: its network, its gradient, how the host manages it, and its file."""

import json

import comfy.model_management
import comfy.ops
import comfy.samplers
import folder_paths
import pytest
import tiny_models
import torch
from palimpsest.kernels import contextdiff
from palimpsest.nodes import files as storage
from palimpsest.nodes.contextdiff import files as context_files
from palimpsest.nodes.contextdiff.adapter import (
    SIZES,
    AdapterConfig,
    ContextAdapter,
    build,
    closed,
    describe,
    initialise,
)
from palimpsest.nodes.contextdiff.nodes import ContextSampler, LoadContextAdapter, SaveContextAdapter
from safetensors.torch import load_file, save_file
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
    from palimpsest.nodes.contextdiff.adapter import attend

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


# ---- its file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_context."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    context_files.SHELF.register()
    return tmp_path / context_files.SHELF.folder


def save(adapter, **settings):
    return tiny_models.execute(SaveContextAdapter, context_adapter=adapter, **settings)[0]


@pytest.mark.parametrize("video", [False, True])
def test_what_is_saved_comes_back(folder, video):
    made = ContextAdapter.of(awake(network(video=video)), {"formula": "paper", "steps": 200, "loss": 0.25})
    name = save(made)
    assert name in context_files.listed()
    again, report = tiny_models.execute(LoadContextAdapter, file=name)
    assert (again.config, again.info) == (made.config, made.info)
    assert torch.equal(again(latents(), texts(), 0.5), made(latents(), texts(), 0.5))
    assert all(word in report for word in ("SD15 latents", f"{TEXT} channels", "steps 200", "loss 0.25"))
    assert "untrained" in describe(ContextAdapter.new(config()))


def test_float16_is_half_the_file(folder):
    made = ContextAdapter.of(awake(network()))
    full, half = (folder / save(made, filename="x", precision=p) for p in ("float32", "float16"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    again = context_files.load(str(half))
    torch.testing.assert_close(again(latents(), texts(), 0.5), made(latents(), texts(), 0.5), rtol=0.05, atol=0.02)


def test_no_file_is_replaced_and_no_name_leaves_the_folder(folder):
    made = ContextAdapter.new(config())
    assert [save(made, filename="../a b/c:d"), save(made, filename="../a b/c:d")] == [
        "a bcd_00001.safetensors", "a bcd_00002.safetensors",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == context_files.listed()
    with pytest.raises(ValueError, match="no letters or digits"):
        save(made, filename="../..")


def test_a_failed_save_leaves_no_file(folder, monkeypatch):
    def fail(tensors, path, metadata):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(ContextAdapter.new(config()))
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_told_before(folder, monkeypatch):
    usage = storage.shutil.disk_usage(".")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"disk has 0 MB free.*float16"):
        save(ContextAdapter.new(config()))


def test_a_file_is_read_again_only_when_it_changed(folder):
    import os

    name = save(ContextAdapter.new(config()))
    first = LoadContextAdapter.fingerprint_inputs(name)
    assert LoadContextAdapter.fingerprint_inputs(name) == first
    os.utime(folder / name, (1, 1))
    assert LoadContextAdapter.fingerprint_inputs(name) != first
    assert "missing" in LoadContextAdapter.fingerprint_inputs("gone.safetensors")


def damaged(folder, change, header=None):
    """A saved adapter with other tensors or another header."""
    path = folder / save(ContextAdapter.of(awake(network())))
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=found | (header or {}))
    return str(path)


def nothing(tensors):
    pass


@pytest.mark.parametrize(
    ("change", "header", "message"),
    [
        (nothing, {"format": "other"}, "not a context adapter"),
        (nothing, {"version": "99"}, "update Palimpsest"),
        (nothing, {"config": "{}"}, "damaged"),
        (nothing, {"config": "not json"}, "damaged"),
        (nothing, {"config": json.dumps({"latent_format": "SD15", "latent_channels": 4, "text_width": 24,
                                         "width": 64})}, "do not fit its layout"),
        (nothing, {"config": json.dumps({"latent_format": "SD15", "latent_channels": 4, "text_width": 24,
                                         "width": 10**9})}, "must be from 1 to 4096"),
        (lambda t: t.pop("out.weight"), {}, "out.weight"),
        (lambda t: t.update(more=torch.zeros(1)), {}, "more"),
        (lambda t: t["out.weight"].fill_(float("nan")), {}, "NaN"),
        (lambda t: t.update({"out.weight": t["out.weight"].half()}), {}, "one type of number"),
        (lambda t: t.update({k: v.int() for k, v in t.items()}), {}, "one type of number"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_reason(folder, change, header, message):
    path = damaged(folder, change, header)
    with pytest.raises(ValueError, match=message):
        context_files.load(path)


def test_a_cut_off_or_foreign_file_is_refused(folder):
    path = folder / save(ContextAdapter.new(config()))
    whole = path.read_bytes()
    for piece in (whole[: len(whole) // 2], whole[:5], b"", b"something else entirely"):
        path.write_bytes(piece)
        with pytest.raises(ValueError, match="cut off or damaged"):
            context_files.load(str(path))


def test_only_safetensors_files_are_listed(folder):
    folder.mkdir(parents=True)
    for name in ("a.safetensors", "b.pt", "c.safetensors.part"):
        (folder / name).write_bytes(b"")
    assert context_files.listed() == ["a.safetensors"]
