"""KV Inversion on every kind of U-Net (SD 1.5, SDXL, v-prediction, inpainting, instruct-pix2pix), and in batches."""

import comfy.model_detection
import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from palimpsest.nodes import host
from palimpsest.nodes.kv.nodes import ApplyKV
from palimpsest.nodes.kv.settings import CONDITIONAL

import nodes

STEPS, GUIDANCE = 3, 3.0
MODES = ("extend", "recompute", "frozen")
VARIANTS = {
    "sd15": ("sd15", "EPS"),
    "sd15-v": ("sd15", "V_PREDICTION"),
    "sd15-inpaint": ("sd15-inpaint", "EPS"),
    "sd15-instruct": ("sd15-instruct", "EPS"),
    "sdxl": ("sdxl", "EPS"),
    "sdxl-v": ("sdxl", "V_PREDICTION"),
    "sdxl-inpaint": ("sdxl-inpaint", "EPS"),
    "sdxl-instruct": ("sdxl-instruct", "EPS"),
    "sdxl-deep": ("sdxl-deep", "EPS"),
}

pytestmark = pytest.mark.usefixtures("inference")


def prompts(family):
    """(positive, negative) as the host's conditioning nodes make them for this kind of model."""
    both = {"positive": tiny_models.prompt(1, family=family), "negative": tiny_models.prompt(2, family=family)}
    vae, pixels = tiny_models.AveragingVAE(), tiny_models.picture()
    if family.endswith("inpaint"):
        mask = torch.zeros(1, 64, 64)
        mask[:, 16:48, 8:40] = 1
        settings = {"vae": vae, "pixels": pixels, "mask": mask, "noise_mask": False}
        return tiny_models.execute(nodes.InpaintModelConditioning, **both, **settings)[:2]
    if family.endswith("instruct"):
        return tiny_models.execute(InstructPixToPixConditioning, **both, vae=vae, pixels=pixels)[:2]
    return tuple(both.values())


def invert(model, latent, positive, negative):
    """(trajectory, inverted noise, DDIM's reconstruction at the guidance of the edit)."""
    settings = {"steps": STEPS, "reconstruction_guidance": GUIDANCE}
    return harness.invert(model, latent, positive, negative, **settings)[:3]


def tune(model, trajectory, positive, negative, **settings):
    """(kv, reconstruction)."""
    return harness.tune(model, trajectory, positive, negative, **{"inner_steps": 4} | settings)[:2]


def sample(model, noise, positive, negative):
    """The host's own sampler from inverted noise."""
    return harness.sample(model, noise, positive, negative, steps=STEPS)


def error(rebuilt, latent):
    """Distance from the picture, per picture of the batch."""
    return (rebuilt - latent["samples"]).flatten(1).norm(dim=1)


def learned(kv):
    """All that was learned, in one tensor."""
    return torch.cat([*(step.flatten().float() for step in kv.learned if step is not None), kv.scalars.flatten()])


# ---- every kind of model


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """(model, latent, prompts, inverted noise, DDIM's reconstruction, kv, reconstruction) of one kind of model."""
    with torch.inference_mode():
        family, prediction = VARIANTS[request.param]
        model, latent = tiny_models.unet(family, prediction), tiny_models.latent()
        both = prompts(family)
        trajectory, noise, plain = invert(model, latent, *both)
        return model, latent, both, noise, plain, *tune(model, trajectory, *both)


def test_tuning_rebuilds_the_picture_better_than_ddim(variant):
    _, latent, _, _, plain, _, rebuilt = variant
    assert error(rebuilt, latent) < 0.95 * error(plain, latent)


def test_the_stock_sampler_rebuilds_it_too(variant):
    model, _, both, noise, _, kv, rebuilt = variant
    patched = tiny_models.execute(ApplyKV, model=model, kv=kv, mode="recompute", source_guidance=1.0)[0]
    torch.testing.assert_close(sample(patched, noise, *both), rebuilt, rtol=2e-2, atol=2e-2)  # stored in half precision


@pytest.mark.parametrize(("mode", "source_guidance"), [*((mode, 1.0) for mode in MODES), ("extend", 4.0)])
def test_every_mode_samples_a_picture_of_its_own(variant, mode, source_guidance):
    model, _, both, noise, plain, kv, _ = variant
    settings = {"model": model, "kv": kv, "mode": mode, "source_guidance": source_guidance}
    edited = sample(tiny_models.execute(ApplyKV, **settings)[0], noise, *both)
    assert torch.isfinite(edited).all()
    assert (edited - plain).norm() > 1e-4 * plain.norm()


def test_strength_0_is_the_model_itself(variant):
    model, _, both, noise, _, kv, _ = variant
    patched = tiny_models.execute(ApplyKV, model=model, kv=kv, strength=0.0)[0]
    assert torch.equal(sample(patched, noise, *both), sample(model, noise, *both))


@pytest.mark.parametrize("family", ["sd15-inpaint", "sd15-instruct", "sdxl-inpaint", "sdxl-instruct"])
def test_the_extra_input_channels_reach_the_tuning(family):
    model, latent = tiny_models.unet(family), tiny_models.latent()
    positive, negative = prompts(family)
    other_picture = {"concat_latent_image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    other = [[[tensor, extra | other_picture] for tensor, extra in cond] for cond in (positive, negative)]
    trajectory, noise, _ = invert(model, latent, positive, negative)
    assert not torch.equal(noise, invert(model, latent, *other)[1])
    tuned = [learned(tune(model, trajectory, *both, inner_steps=1)[0]) for both in ((positive, negative), other)]
    assert not torch.equal(*tuned)


# ---- layers and their keys

# (block, numbers, transformers in each, tokens, channels) at the size the checkpoints were trained for
SD15_LAYERS = [
    ("input", (1, 2), 1, 4096, 320), ("input", (4, 5), 1, 1024, 640), ("input", (7, 8), 1, 256, 1280),
    ("middle", (0,), 1, 64, 1280), ("output", (3, 4, 5), 1, 256, 1280), ("output", (6, 7, 8), 1, 1024, 640),
    ("output", (9, 10, 11), 1, 4096, 320),
]  # fmt: skip
SDXL_LAYERS = [
    ("input", (4, 5), 2, 4096, 640), ("input", (7, 8), 10, 1024, 1280), ("middle", (0,), 10, 1024, 1280),
    ("output", (0, 1, 2), 10, 1024, 1280), ("output", (3, 4, 5), 2, 4096, 640),
]  # fmt: skip


def spelled_out(layers):
    """Every (key, tokens, channels) of a table above, in the order of a forward pass."""
    return [
        ((block, number, index), tokens, channels)
        for block, numbers, transformers, tokens, channels in layers
        for number in numbers
        for index in range(transformers)
    ]


def layers_met_in_a_forward_pass(model, size):
    """(key, tokens, channels) of every self-attention, as the host's patches are told."""
    network, met = model.model.diffusion_model, []

    def note(tokens, options):
        met.append(((*options["block"], options["block_index"]), *tokens.shape[1:]))
        return tokens

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float16, device="meta")

    options = {
        "patches": {"attn1_output_patch": [note]},
        "optimized_attention_override": lambda function, query, *_, **__: query,  # shapes are all we ask for
    }
    width = network.input_blocks[1][-1].transformer_blocks[0].attn2.to_k.in_features if size == 64 else 2048
    pooled = {} if network.num_classes is None else {"y": empty(1, 2816)}
    network(empty(1, 4, size, size), empty(1), context=empty(1, 77, width), transformer_options=options, **pooled)
    return met


@pytest.mark.parametrize(
    ("family", "config", "size", "count", "layers"),
    [("sd15-full", "SD15", 64, 16, SD15_LAYERS), ("sdxl-full", "SDXL", 128, 70, SDXL_LAYERS)],
)
def test_the_layers_of_the_published_models(family, config, size, count, layers):
    model, wanted = tiny_models.unet_without_weights(family), spelled_out(layers)
    names = model.model.diffusion_model.state_dict()
    assert type(comfy.model_detection.model_config_from_unet(names, "")).__name__ == config
    assert layers_met_in_a_forward_pass(model, size) == wanted
    found = host.self_attention_layers(model)
    assert len(found) == count
    assert [(layer.key, layer.channels) for layer in found] == [(key, channels) for key, _, channels in wanted]


def test_the_deep_tiny_model_has_sdxls_own_layers():
    deep, full = tiny_models.unet("sdxl-deep"), tiny_models.unet_without_weights("sdxl-full")
    layers = [host.self_attention_layers(model) for model in (deep, full)]
    assert [layer.key for layer in layers[0]] == [layer.key for layer in layers[1]]
    assert {big.channels / small.channels for small, big in zip(*layers, strict=True)} == {10.0}


def test_all_70_layers_of_sdxl_can_be_tuned():
    model, latent = tiny_models.unet("sdxl-deep"), tiny_models.latent()
    both = prompts("sdxl-deep")
    trajectory, noise, plain = invert(model, latent, *both)
    kv, rebuilt = tune(model, trajectory, *both, layers="all", inner_steps=2)
    assert [layer.key for layer in kv.layers] == [key for key, *_ in spelled_out(SDXL_LAYERS)]
    assert error(rebuilt, latent) < error(plain, latent)
    edited = sample(tiny_models.execute(ApplyKV, model=model, kv=kv, layers="all")[0], noise, *both)
    assert torch.isfinite(edited).all()


# ---- conditioning


@pytest.fixture(scope="module")
def sdxl():
    """(model, positive, negative, trajectory, what is learned from it in one iteration) of a small SDXL."""
    with torch.inference_mode():
        model, both = tiny_models.unet("sdxl"), prompts("sdxl")
        trajectory = invert(model, tiny_models.latent(), *both)[0]
        return model, *both, trajectory, learned(tune(model, trajectory, *both, inner_steps=1)[0])


POOLED = torch.randn(1, 1280, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    "change",
    [{"pooled_output": POOLED}, {"width": 512}, {"height": 256}, {"crop_w": 128}, {"target_height": 2048}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_sdxls_pooled_text_and_sizes_reach_the_tuning(sdxl, change, side):
    model, positive, negative, trajectory, usual = sdxl
    both = {"positive": positive, "negative": negative}
    both[side] = [[tensor, extra | change] for tensor, extra in both[side]]
    assert not torch.equal(learned(tune(model, trajectory, **both, inner_steps=1)[0]), usual)


def test_the_negative_prompt_is_tuned_with_and_only_where_guidance_needs_it(sdxl):
    model, positive, negative, trajectory, usual = sdxl
    other = tiny_models.prompt(11, family="sdxl")

    def one_iteration(negative, **settings):
        return learned(tune(model, trajectory, positive, negative, inner_steps=1, **settings)[0])

    assert torch.equal(one_iteration(negative), usual)
    assert not torch.equal(one_iteration(other), usual)
    assert torch.equal(one_iteration(negative, tune_with=CONDITIONAL), one_iteration(other, tune_with=CONDITIONAL))


# ---- batches


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_three_pictures_with_one_prompt_equal_three_tunings(family):
    model, batch, both = tiny_models.unet(family), tiny_models.latent(3), prompts(family)
    trajectory, noise, _ = invert(model, batch, *both)
    kv, rebuilt = tune(model, trajectory, *both, inner_steps=2)
    assert kv.pictures == 3
    again = sample(
        tiny_models.execute(ApplyKV, model=model, kv=kv, mode="recompute", source_guidance=1.0)[0], noise, *both
    )
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)
    for i in range(3):
        one = {"samples": batch["samples"][i : i + 1]}
        trajectory, noise, plain = invert(model, one, *both)
        alone = tune(model, trajectory, *both, inner_steps=2)[1]
        torch.testing.assert_close(rebuilt[i : i + 1], alone, rtol=1e-2, atol=1e-2)
        assert error(rebuilt[i : i + 1], one) < error(plain, one)


def test_an_edit_of_three_pictures_equals_three_edits():
    model, batch, both = tiny_models.unet(), tiny_models.latent(3), prompts("sd15")
    edit = tiny_models.prompt(4), both[1]

    def edits(pictures):
        trajectory, noise, _ = invert(model, {"samples": pictures}, *both)
        kv = tune(model, trajectory, *both, inner_steps=2)[0]
        patched = [tiny_models.execute(ApplyKV, model=model, kv=kv, mode=mode)[0] for mode in MODES]
        return torch.stack([sample(each, noise, *edit) for each in patched])

    together = edits(batch["samples"])
    for i in range(3):
        alone = edits(batch["samples"][i : i + 1])
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_picture_of_a_batch_may_have_its_own_prompt(family):
    model, batch = tiny_models.unet(family), tiny_models.latent(2)
    own = [tiny_models.prompt(seed, family=family) for seed in (1, 6)]
    negative = tiny_models.prompt(2, family=family)
    pooled = {key: torch.cat([prompt[0][1][key] for prompt in own]) for key in own[0][0][1]}
    stacked = [[torch.cat([prompt[0][0] for prompt in own]), pooled]]
    rebuilt = tune(model, invert(model, batch, stacked, negative)[0], stacked, negative)[1]
    for i, prompt in enumerate(own):
        trajectory = invert(model, {"samples": batch["samples"][i : i + 1]}, prompt, negative)[0]
        alone = tune(model, trajectory, prompt, negative)[1]
        torch.testing.assert_close(rebuilt[i : i + 1], alone, rtol=1e-2, atol=1e-2)
