"""KV Inversion beside what else a graph may hold: other nodes' patches, regional prompts, guiders, samplers, sizes."""

import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.sd
import harness
import pytest
import tiny_models
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from harness import apply, assert_acts, edits, prompts
from palimpsest.nodes import host

import nodes

STEPS, GUIDANCE = 2, 3.0
MODES = ("extend", "recompute", "frozen")

pytestmark = pytest.mark.usefixtures("inference")


def invert(model, latent, positive, negative):
    """(trajectory, inverted noise, DDIM's reconstruction at the guidance of the edit)."""
    settings = {"steps": STEPS, "reconstruction_guidance": GUIDANCE}
    return harness.invert(model, latent, positive, negative, **settings)[:3]


def tune(model, trajectory, positive, negative, **settings):
    """(kv, reconstruction)."""
    return harness.tune(model, trajectory, positive, negative, **{"layers": "all"} | settings)[:2]


def sample(model, noise, positive=None, negative=None, **settings):
    """The host's own sampler from inverted noise, with the prompts of an edit unless others are given."""
    return harness.sample(model, noise, positive, negative, **{"steps": STEPS} | settings)


@pytest.fixture(scope="module")
def tuned():
    """(model, inverted noise, kv) of one picture, tuned in all layers."""
    with torch.inference_mode():
        model = tiny_models.unet()
        trajectory, noise, _ = invert(model, tiny_models.latent(), *prompts())
        return model, noise, tune(model, trajectory, *prompts())[0]


@pytest.fixture(scope="module")
def plain(tuned):
    """What the model samples from that noise without anything of ours."""
    with torch.inference_mode():
        return sample(*tuned[:2])


@pytest.fixture(scope="module")
def alone(tuned):
    """By mode: what it samples with Apply KV and nothing else."""
    model, noise, kv = tuned
    with torch.inference_mode():
        return {mode: sample(apply(model, kv, mode), noise) for mode in MODES}


# ---- patches of other nodes: each takes and gives (model, positive, negative)


def with_lora(model, *both):
    return comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)[0], *both


def with_lora_on_one_prompt(model, positive, negative):
    hooks = comfy.hooks.create_hook_lora(tiny_models.lora(model), 1.0, 0.0)
    model = model.clone()
    model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    return model, [[tensor, extra | {"hooks": hooks}] for tensor, extra in positive], negative


def with_controlnet(model, positive, negative):
    inputs = {"control_net": tiny_models.controlnet(), "image": tiny_models.picture(seed=4), "strength": 0.5}
    window = {"start_percent": 0.0, "end_percent": 1.0}
    both = {"positive": positive, "negative": negative}
    return model, *tiny_models.execute(nodes.ControlNetApplyAdvanced, **both, **inputs, **window)


def patched_by(setter):
    """A partner that changes a clone of the model by a function `setter(clone)`."""

    def partner(model, *both):
        patched = model.clone()
        setter(patched)
        return patched, *both

    return partner


def replace_cross_attention(model):
    def attend(query, key, value, options):
        return 1.5 * optimized_attention(query, key, value, options["n_heads"], transformer_options=options)

    for layer in host.self_attention_layers(model):
        model.set_model_attn2_replace(attend, layer.block, layer.number)


def replace_self_attention(model):
    """As a well-mannered pack does it: what was in the slot before is called."""
    for layer in host.self_attention_layers(model):
        slots = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        earlier = slots.get(layer.key, slots.get(layer.key[:2]))

        def attend(query, key, value, options, earlier=earlier):
            if earlier is not None:
                return 1.2 * earlier(query, key, value, options)
            return 1.2 * optimized_attention(query, key, value, options["n_heads"], transformer_options=options)

        model.set_model_attn1_replace(attend, *layer.key)


def scale_text(n, context, value, options):
    return n, context * 1.3, value


def scale_tokens(n, context, value, options):
    scaled = context * 1.3
    return n * 1.3, scaled, scaled


def scale_output(n, options):
    return n * 1.3


def scale_features(h, skip, options):
    """What FreeU does: half of the backbone's channels stronger, the skip weaker."""
    scaled = h.clone()
    scaled[:, : h.shape[1] // 2] *= 1.4
    return scaled, skip * 0.8


def wrap_model_function(model):
    def at_another_time_of_day(run, call):
        return run(call["input"], call["timestep"] * 0.9, **call["c"])

    model.set_model_unet_function_wrapper(at_another_time_of_day)


def guide_less(args):
    return args["uncond"] + (1 + 0.5 * (args["cond_scale"] - 1)) * (args["cond"] - args["uncond"])


def override_attention(model):
    def attend(function, *args, **kwargs):
        return 1.1 * function(*args, **kwargs)

    options = model.model_options["transformer_options"] = model.model_options["transformer_options"].copy()
    options["optimized_attention_override"] = attend


PARTNERS = {
    "lora": with_lora,
    "lora on one prompt": with_lora_on_one_prompt,
    "controlnet": with_controlnet,
    "attn2_replace": patched_by(replace_cross_attention),
    "attn2_patch": patched_by(lambda model: model.set_model_attn2_patch(scale_text)),
    "attn2_output_patch": patched_by(lambda model: model.set_model_attn2_output_patch(scale_output)),
    "attn1_patch": patched_by(lambda model: model.set_model_attn1_patch(scale_tokens)),
    "attn1_replace": patched_by(replace_self_attention),
    "attn1_output_patch": patched_by(lambda model: model.set_model_attn1_output_patch(scale_output)),
    "output_block_patch": patched_by(lambda model: model.set_model_output_block_patch(scale_features)),
    "model_function_wrapper": patched_by(wrap_model_function),
    "sampler_cfg_function": patched_by(lambda model: model.set_model_sampler_cfg_function(guide_less)),
    "optimized_attention_override": patched_by(override_attention),
}
IN_SELF_ATTENTION = ("attn1_patch", "attn1_replace", "attn1_output_patch", "optimized_attention_override")


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "extend") for name in PARTNERS), *((name, mode) for name in IN_SELF_ATTENTION for mode in MODES[1:])],
)
def test_in_any_order_both_act_and_the_model_stays_itself(tuned, plain, alone, name, mode):
    model, noise, kv = tuned
    partner = PARTNERS[name]
    theirs, *both = partner(model, *edits())
    theirs_alone = sample(theirs, noise, *both)
    assert_acts(theirs_alone, plain)
    last = sample(apply(theirs, kv, mode), noise, *both)
    ours_first, *both_after = partner(apply(model, kv, mode), *edits())
    torch.testing.assert_close(sample(ours_first, noise, *both_after), last, rtol=1e-5, atol=1e-5)
    assert_acts(last, alone[mode])
    assert_acts(last, theirs_alone)
    assert torch.equal(sample(apply(theirs, kv, mode, strength=0.0), noise, *both), theirs_alone)
    assert torch.equal(sample(model, noise), plain)


@pytest.mark.parametrize(
    "name", ["lora on one prompt", "controlnet", "attn1_replace", "model_function_wrapper", "sampler_cfg_function"]
)
def test_source_guidance_beside_other_patches(tuned, alone, name):
    model, noise, kv = tuned
    theirs, *both = PARTNERS[name](model, *edits())
    ours_first, *both_after = PARTNERS[name](apply(model, kv, source_guidance=8.0), *edits())
    first, last = sample(ours_first, noise, *both_after), sample(apply(theirs, kv, source_guidance=8.0), noise, *both)
    torch.testing.assert_close(first, last, rtol=1e-5, atol=1e-5)
    assert_acts(last, alone["extend"])
    assert_acts(last, sample(apply(theirs, kv), noise, *both))


@pytest.mark.parametrize(
    ("name", "layers"), [*((name, "decoder") for name in PARTNERS), ("lora", "all"), ("controlnet", "all")]
)
def test_tuning_with_other_patches_on_the_model(tuned, plain, name, layers):
    model, latent = tuned[0], tiny_models.latent()
    theirs, *both = PARTNERS[name](model, *prompts())
    trajectory, noise, by_ddim = invert(theirs, latent, *both)
    kv, rebuilt = tune(theirs, trajectory, *both, layers=layers, learning_rate=0.2)
    wanted = latent["samples"]
    assert (rebuilt - wanted).norm() < 0.95 * (by_ddim - wanted).norm()
    again = sample(apply(theirs, kv, "recompute"), noise, *both)
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)  # stored in half precision
    assert torch.equal(sample(model, tuned[1]), plain)


def test_several_partners_at_once(tuned, plain):
    model, noise, kv = tuned
    chosen = [PARTNERS[name] for name in ("lora", "controlnet", "attn2_replace", "attn1_replace", "output_block_patch")]

    def chain(*steps):
        state = model, *edits()
        for step in steps:
            state = step(*state)
        return sample(state[0], noise, *state[1:])

    def ours(model, *both):
        return apply(model, kv), *both

    without = chain(*chosen)
    first, amid, last = chain(ours, *chosen), chain(*chosen[:3], ours, *chosen[3:]), chain(*chosen, ours)
    torch.testing.assert_close(first, last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(amid, last, rtol=1e-5, atol=1e-5)
    assert_acts(last, without)
    assert torch.equal(sample(model, noise), plain)


@pytest.mark.parametrize("whole_block", [True, False], ids=["block", "layer"])
@pytest.mark.parametrize("theirs_last", [True, False], ids=["theirs last", "theirs first"])
def test_a_replacement_that_calls_nobody_still_acts_on_its_layer(tuned, alone, theirs_last, whole_block):
    """Other packs name a layer by (block, number) or (block, number, index); either way theirs must not be lost."""
    model, noise, kv = tuned
    layer, seen = kv.layers[-1], []

    def only_values(query, key, value, options):
        seen.append(len(query))
        return value[:, : query.shape[1]]

    def theirs(model):
        patched = model.clone()
        patched.set_model_attn1_replace(only_values, *layer.key[: 2 if whole_block else 3])
        return patched

    patched = theirs(apply(model, kv)) if theirs_last else apply(theirs(model), kv)
    both = sample(patched, noise)
    assert len(seen) == STEPS
    assert_acts(both, sample(theirs(model), noise))  # in the other layers
    assert_acts(both, alone["extend"])


# ---- the host's own nodes of that kind

HOST_NODES = {
    "FreeU_V2": ("nodes_freelunch", {}),
    "TomePatchModel": ("nodes_tomesd", {"ratio": 0.5}),
    "HyperTile": ("nodes_hypertile", {"tile_size": 32, "swap_size": 2, "max_depth": 0}),
    "PerturbedAttentionGuidance": ("nodes_pag", {}),
    "SelfAttentionGuidance": ("nodes_sag", {}),
    "PatchModelAddDownscale": ("nodes_model_downscale", {"block_number": 1, "end_percent": 1.0}),
    "UNetSelfAttentionMultiply": ("nodes_attention_multiply", {"q": 1.5, "k": 1.2}),
    "UNetCrossAttentionMultiply": ("nodes_attention_multiply", {"q": 1.5, "k": 1.2}),
}


def host_node(name):
    """A function that puts one of the host's nodes on a model."""
    module, settings = HOST_NODES[name]
    node = getattr(pytest.importorskip(f"comfy_extras.{module}"), name)
    return lambda model: tiny_models.execute(node, model=model, **settings)[0]


@pytest.mark.parametrize(
    ("mode", "masked", "theirs_last"),
    [
        ("extend", False, True),
        ("extend", False, False),
        ("recompute", False, True),
        ("frozen", False, False),
        ("extend", True, True),
    ],
    ids=["extend, theirs last", "extend, theirs first", "recompute", "frozen", "masked"],
)
@pytest.mark.parametrize("name", HOST_NODES)
def test_the_hosts_nodes_run_or_are_refused_with_a_way_out(tuned, alone, name, mode, masked, theirs_last):
    """In all layers: the host's guidance nodes replace the self-attention of the middle block."""
    model, noise, kv = tuned
    theirs, settings = host_node(name), {"mask": torch.ones(1, 8, 8).tril()} if masked else {}
    torch.manual_seed(0)  # two of them draw lots
    theirs_alone = sample(theirs(model), noise)
    torch.manual_seed(0)
    try:
        if theirs_last:
            both = sample(theirs(apply(model, kv, mode, **settings)), noise)
        else:
            both = sample(apply(theirs(model), kv, mode, **settings), noise)
    except ValueError as refusal:
        assert "another node" in str(refusal)  # by name of the cause, and what to do
        assert any(way in str(refusal) for way in ("take it out", "take the other node out", "after this one"))
        return
    assert_acts(both, theirs_alone)
    if (name, mode) == ("HyperTile", "frozen"):  # every tile looks at the whole source, and at nothing else
        torch.testing.assert_close(both, alone[mode], rtol=1e-3, atol=1e-3)
        return
    assert_acts(both, sample(apply(model, kv, mode, **settings), noise) if masked else alone[mode])


@pytest.mark.parametrize("name", HOST_NODES)
def test_as_strength_vanishes_only_the_hosts_node_is_left(tuned, name):
    """Or the two are refused together: they must not give a mixture that nobody asked for."""
    model, noise, kv = tuned
    theirs = host_node(name)
    torch.manual_seed(0)
    theirs_alone = sample(theirs(model), noise)
    torch.manual_seed(0)
    try:
        both = sample(theirs(apply(model, kv, strength=1e-6)), noise)
    except ValueError as refusal:
        assert "another node" in str(refusal)
        return
    torch.testing.assert_close(both, theirs_alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", HOST_NODES)
def test_the_hosts_nodes_act_beside_an_edit_in_the_decoder(tuned, name):
    """As most people use both."""
    model, noise, kv = tuned
    theirs, settings = host_node(name), {"layers": "decoder", "mode": "extend"}
    torch.manual_seed(0)
    theirs_alone = sample(theirs(model), noise)
    for patched in (theirs(apply(model, kv, **settings)), apply(theirs(model), kv, **settings)):
        torch.manual_seed(0)
        both = sample(patched, noise)
        assert_acts(both, theirs_alone)
        assert_acts(both, sample(apply(model, kv, **settings), noise))


# ---- regional prompts


def masked(prompt, columns, bounds="default"):
    mask = torch.zeros(1, 64, 64)
    mask[..., columns] = 1
    inputs = {"conditioning": prompt, "mask": mask, "set_cond_area": bounds, "strength": 1.0}
    return tiny_models.execute(nodes.ConditioningSetMask, **inputs)[0]


def in_area(prompt, x, y, width, height):
    inputs = {"conditioning": prompt, "x": x, "y": y, "width": width, "height": height, "strength": 1.0}
    return tiny_models.execute(nodes.ConditioningSetArea, **inputs)[0]


def combined(*prompts):
    found = prompts[0]
    for prompt in prompts[1:]:
        found = tiny_models.execute(nodes.ConditioningCombine, conditioning_1=found, conditioning_2=prompt)[0]
    return found


def in_time(prompt, start, end):
    return tiny_models.execute(nodes.ConditioningSetTimestepRange, conditioning=prompt, start=start, end=end)[0]


LEFT, RIGHT = slice(0, 32), slice(32, 64)
REGIONS = {
    "two masks": lambda a, b: combined(masked(a, LEFT), masked(b, RIGHT)),
    "bounds of masks": lambda a, b: combined(masked(a, LEFT, "mask bounds"), masked(b, RIGHT, "mask bounds")),
    "two areas": lambda a, b: combined(in_area(a, 0, 0, 32, 64), in_area(b, 32, 0, 32, 64)),
    "area in a picture": lambda a, b: combined(a, in_area(b, 16, 24, 40, 24)),
    "odd area at the edge": lambda a, b: combined(a, in_area(b, 40, 8, 24, 56)),
    "two prompts": combined,
    "two lengths": lambda a, b: combined(a, tiny_models.prompt(5, tokens=40)),
    "one after another": lambda a, b: combined(in_time(a, 0.0, 0.5), in_time(b, 0.5, 1.0)),
}
regions = pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS.keys())


@regions
@pytest.mark.parametrize("mode", MODES)
def test_regional_prompts(tuned, mode, region):
    model, noise, kv = tuned
    positive = region(tiny_models.prompt(3), tiny_models.prompt(4))
    without = sample(model, noise, positive)
    assert_acts(sample(apply(model, kv, mode), noise, positive), without)
    assert torch.equal(sample(model, noise, positive), without)


@regions
def test_regional_prompts_with_source_guidance_and_at_strength_0(tuned, region):
    model, noise, kv = tuned
    positive = region(tiny_models.prompt(3), tiny_models.prompt(4))
    negative = region(tiny_models.prompt(2), tiny_models.prompt(5))
    without = sample(model, noise, positive, negative)
    assert_acts(sample(apply(model, kv, source_guidance=4.0), noise, positive, negative), without)
    assert torch.equal(sample(apply(model, kv, strength=0.0), noise, positive, negative), without)


@pytest.mark.parametrize("mode", MODES)
def test_one_area_of_full_size_is_no_area(tuned, mode):
    model, noise, kv = tuned
    patched, prompt = apply(model, kv, mode), tiny_models.prompt(3)
    whole = sample(patched, noise, in_area(prompt, 0, 0, 64, 64))
    torch.testing.assert_close(whole, sample(patched, noise, prompt), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_is_cropped_as_the_area_is(tuned, mode):
    """Areas over two halves, the source in the left one: the right half's prompts see the plain model."""
    model, noise, kv = tuned
    mask = torch.zeros(1, 64, 64)
    mask[..., LEFT] = 1
    halves = [REGIONS["two areas"](*both) for both in (map(tiny_models.prompt, (3, 4)), prompts())]
    without = sample(model, noise, *halves, steps=1)
    edited = sample(apply(model, kv, mode, mask=mask), noise, *halves, steps=1)
    torch.testing.assert_close(edited[..., 4:], without[..., 4:], rtol=1e-5, atol=1e-5)
    assert_acts(edited[..., :4], without[..., :4])


@regions
def test_tuning_with_regional_prompts_helps_or_is_refused(tuned, region):
    model, latent = tuned[0], tiny_models.latent()
    both = region(tiny_models.prompt(3), tiny_models.prompt(4)), tiny_models.prompt(2)
    trajectory, _, by_ddim = invert(model, latent, *both)
    try:
        rebuilt = tune(model, trajectory, *both, layers="decoder")[1]
    except ValueError as refusal:
        assert "area" in str(refusal)
        return
    assert (rebuilt - latent["samples"]).norm() < (by_ddim - latent["samples"]).norm()


# ---- guiders and samplers


@pytest.mark.parametrize("source_guidance", [1.0, 4.0])
@pytest.mark.parametrize("style", ["regular", "nested"])
@pytest.mark.parametrize("tokens", [7, 40], ids=["one call", "separate calls"])
def test_dual_guidance(tuned, tokens, style, source_guidance):
    model, noise, kv = tuned
    conds = {"cond1": tiny_models.prompt(3), "cond2": tiny_models.prompt(4, tokens), "negative": prompts()[1]}
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)

    def guided(model):
        settings = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": style}
        guider = tiny_models.execute(DualCFGGuider, model=model, **conds, **settings)[0]
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(torch.zeros_like(noise), noise, sampler, sigmas, disable_pbar=True, seed=1)

    without = guided(model)
    assert_acts(guided(apply(model, kv, source_guidance=source_guidance)), without)
    assert torch.equal(guided(apply(model, kv, strength=0.0)), without)


@pytest.mark.parametrize(
    "sampler",
    ["ddim", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm"],
)
def test_samplers(tuned, sampler):
    model, noise, kv = tuned
    without = sample(model, noise, sampler=sampler)
    assert_acts(sample(apply(model, kv, source_guidance=4.0), noise, sampler=sampler), without)
    assert torch.equal(sample(apply(model, kv, strength=0.0), noise, sampler=sampler), without)


@pytest.mark.parametrize("scheduler", ["karras", "ddim_uniform", "sgm_uniform"])
@pytest.mark.parametrize("steps", [3, 5])
def test_other_schedules_than_tuned(tuned, steps, scheduler):
    model, noise, kv = tuned
    schedule = {"steps": steps, "scheduler": scheduler}
    assert_acts(sample(apply(model, kv), noise, **schedule), sample(model, noise, **schedule))


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_other_guidance_than_tuned(tuned, cfg):
    model, noise, kv = tuned
    without = sample(model, noise, cfg=cfg)
    for mode in MODES:
        assert_acts(sample(apply(model, kv, mode), noise, cfg=cfg), without)


@pytest.mark.parametrize("tokens", [(7, 40), (40, 7), (1, 77)])
def test_prompts_of_different_lengths(tuned, tokens):
    model, noise, kv = tuned
    both = [tiny_models.prompt(seed, length) for seed, length in zip((3, 2), tokens, strict=True)]
    assert_acts(sample(apply(model, kv, source_guidance=4.0), noise, *both), sample(model, noise, *both))


# ---- sizes, batches, inpainting


@pytest.mark.parametrize(("height", "width"), [(9, 7), (11, 8), (5, 12)])
def test_odd_sizes(height, width):
    model, latent = tiny_models.unet(), tiny_models.latent(height=height, width=width)
    trajectory, noise, by_ddim = invert(model, latent, *prompts())
    kv, rebuilt = tune(model, trajectory, *prompts())
    assert (rebuilt - latent["samples"]).norm() < (by_ddim - latent["samples"]).norm()
    again = sample(apply(model, kv, "recompute"), noise, *prompts())
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)  # stored in half precision
    without = sample(model, noise)
    for mode in MODES:
        patched = apply(model, kv, mode, mask=torch.ones(1, 50, 30).tril(), source_guidance=4.0)
        assert_acts(sample(patched, noise), without)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("mode", MODES)
def test_batches(tuned, mode, strength):
    """Each picture of a batch is edited as it would be alone, under its own mask."""
    model, noise, kv = tuned
    batch = noise + torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2)).round()
    settings = {"strength": strength, "source_guidance": 4.0}
    together = sample(apply(model, kv, mode, mask=masks, **settings), batch)
    for i in range(3):
        alone = sample(apply(model, kv, mode, mask=masks[i : i + 1], **settings), batch[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_inpainting_with_a_latents_mask(tuned, mode):
    model, _, kv = tuned
    picture = tiny_models.latent(seed=3)["samples"]
    fresh = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1

    def inpaint(model):
        sampling = comfy.samplers.KSampler(model, STEPS, torch.device("cpu"), "euler", "normal")
        settings = {"cfg": GUIDANCE, "latent_image": picture, "denoise_mask": mask, "disable_pbar": True, "seed": 1}
        return sampling.sample(fresh, *edits(), **settings)

    without = inpaint(model)
    edited = inpaint(apply(model, kv, mode, source_guidance=4.0))
    assert_acts(edited, without)
    torch.testing.assert_close(edited[..., :4], picture[..., :4], rtol=1e-5, atol=1e-5)
    assert torch.equal(inpaint(apply(model, kv, mode, strength=0.0)), without)


# ---- two subjects


@pytest.fixture(scope="module")
def subjects(tuned):
    """(model, noise, kv of the first, kv of the second, mask of the left half, mask of the right half)."""
    with torch.inference_mode():
        model, noise, first = tuned
        trajectory, *_ = invert(model, tiny_models.latent(seed=8), *prompts())
        left = torch.zeros(1, 64, 64)
        left[..., LEFT] = 1
        return model, noise, first, tune(model, trajectory, *prompts())[0], left, 1 - left


def self_attention_of_the_first_layer(patched, noise, layer):
    """What it draws in the first model call, on the host's grid (rows, H, W, C): nothing before it differs yet."""
    seen = []

    def note(n, options):
        if (*options["block"], options["block_index"]) == layer.key:
            seen.append(n.unflatten(1, tuple(options["activations_shape"][-2:])))
        return n

    listening = patched.clone()
    listening.set_model_attn1_output_patch(note)
    sample(listening, noise, steps=1)
    return seen[0]


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("modes", [(a, b) for a in MODES for b in MODES])
def test_two_subjects_each_rule_their_own_half(subjects, modes, strength):
    model, noise, first, second, left, right = subjects
    one = {"mode": modes[0], "strength": strength}
    two = {"mode": modes[1], "strength": strength}
    both, only_first, only_second = (
        self_attention_of_the_first_layer(patched, noise, first.layers[0])
        for patched in (
            apply(apply(model, first, mask=left, **one), second, mask=right, **two),
            apply(model, first, **one),
            apply(model, second, **two),
        )
    )
    half = both.shape[2] // 2
    assert_acts(only_first, only_second)
    torch.testing.assert_close(both[:, :, :half], only_first[:, :, :half], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[:, :, half:], only_second[:, :, half:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("modes", "source_guidance"),
    [
        *(((mode, mode), 1.0) for mode in MODES),
        (("extend", "recompute"), 1.0),
        (("recompute", "frozen"), 1.0),
        (("frozen", "extend"), 1.0),
        (("extend", "extend"), 4.0),
    ],
)
def test_two_subjects_in_any_order(subjects, plain, modes, source_guidance):
    model, noise, first, second, left, right = subjects
    one = {"mode": modes[0], "mask": left, "source_guidance": source_guidance}
    two = {"mode": modes[1], "mask": right, "source_guidance": source_guidance}
    both = sample(apply(apply(model, first, **one), second, **two), noise)
    other_order = sample(apply(apply(model, second, **two), first, **one), noise)
    torch.testing.assert_close(both, other_order, rtol=1e-4, atol=1e-4)
    assert_acts(both, sample(apply(model, first, **one), noise))
    assert_acts(both, sample(apply(model, second, **two), noise))
    assert torch.equal(sample(model, noise), plain)


# ---- cancelling


@pytest.mark.parametrize("source_guidance", [1.0, 4.0])
def test_cancelling_in_mid_sampling_leaves_nothing_behind(tuned, plain, monkeypatch, source_guidance):
    model, noise, kv = tuned
    patched = apply(model, kv, source_guidance=source_guidance)
    edited, options = sample(patched, noise), set(patched.model_options["transformer_options"])
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 200:  # every layer of the network asks
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, noise)
    monkeypatch.undo()
    assert set(patched.model_options["transformer_options"]) == options
    assert torch.equal(sample(model, noise), plain)
    assert torch.equal(sample(patched, noise), edited)
