"""Keys and values kept over the steps: the same picture to the bit, beside other nodes' patches, at a counted cost."""

from types import SimpleNamespace

import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.sd
import harness
import pytest
import tiny_models
import torch
from benchmarks import counting
from comfy.ldm.modules.attention import optimized_attention
from palimpsest.kernels.connector import repeated
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import call as host_call
from palimpsest.nodes.multimodal import context_cache
from palimpsest.nodes.multimodal.context_cache import NAME, Padded, cache_context

STEPS, GUIDANCE = 3, 4.0

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet()


def prompts(family="sd15", tokens=20):
    return tuple(tiny_models.prompt(seed, tokens, family) for seed in (1, 2))


def sample(model, positive, negative, *, sampler="euler", steps=STEPS, pictures=1, size=(8, 8)):
    added = harness.noise(*size, pictures=pictures, seed=0)
    return harness.sample_noise(model, added, positive, negative, sampler=sampler, steps=steps, cfg=GUIDANCE)


class CountProjections:
    """Counts the tokens that a model's to_k layers are given."""

    def __init__(self, model):
        self.tokens, self.hooks = [], []
        for name, module in model.model.diffusion_model.named_modules():
            if name.endswith("attn2.to_k"):
                self.hooks.append(module.register_forward_pre_hook(self.note))

    def note(self, module, inputs):
        self.tokens.append(inputs[0].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def projected(model, *prompts, **settings):
    """(picture, tokens that to_k was given)."""
    with CountProjections(model) as count:
        return sample(model, *prompts, **settings), count.tokens


# ---- the same picture


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2s_ancestral"])
def test_the_picture_is_the_same_bit_for_bit(family, sampler):
    model = tiny_models.unet(family)
    plain = sample(model, *prompts(family), sampler=sampler)
    assert torch.equal(sample(cache_context(model), *prompts(family), sampler=sampler), plain)
    assert torch.equal(sample(model, *prompts(family), sampler=sampler), plain)


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_batches_and_odd_sizes_are_the_same(model, pictures, size):
    settings = {"pictures": pictures, "size": size}
    assert torch.equal(sample(cache_context(model), *prompts(), **settings), sample(model, *prompts(), **settings))


def test_prompts_of_other_lengths_areas_and_masks_are_the_same(model):
    positive, negative = prompts()
    area = tiny_models.prompt(3, 7)
    area[0][1]["area"] = (4, 6, 2, 0)
    masked = tiny_models.prompt(4, 9)
    masked[0][1]["mask"] = torch.ones(1, 8, 8).tril()
    several = [*positive, *area, *masked]
    assert torch.equal(sample(cache_context(model), several, negative), sample(model, several, negative))


def test_projections_run_once_a_prompt(model):
    _, plain = projected(model, *prompts())
    _, kept = projected(cache_context(model), *prompts())
    layers = len(plain) // STEPS
    assert plain == [20] * layers * STEPS
    assert kept == [20] * layers + [1] * layers * (STEPS - 1)


def test_nothing_is_left_behind(model):
    runs = []

    class Note:
        def __call__(self, n, context, value, options):
            runs.append(host.call_of(options).run)
            return n, context, value

    patched = cache_context(model)
    patched.set_model_attn1_patch(Note())
    sample(patched, *prompts())
    assert len(set(map(id, runs))) == 1
    assert runs[0].things[NAME].kept
    assert host_call.RUN not in patched.model_options["transformer_options"]
    assert NAME not in patched.model_options["transformer_options"]
    sample(patched, *prompts())
    assert len(set(map(id, runs))) == 2


def test_a_cancelled_run_leaves_nothing_behind(model):
    patched = cache_context(model)
    patched.set_model_attn1_patch(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample(patched, *prompts())
    assert host_call.RUN not in patched.model_options["transformer_options"]


def test_another_prompt_in_the_next_run_is_not_taken_for_this_one(model):
    patched, others = cache_context(model), (tiny_models.prompt(5, 20), tiny_models.prompt(6, 20))
    sample(patched, *prompts())
    assert torch.equal(sample(patched, *others), sample(model, *others))


# ---- beside other nodes


def with_lora(model):
    return comfy.sd.load_lora_for_models(model, None, tiny_models.lora(model), 1.0, 0.0)[0]


def with_text_patch(model):
    model = model.clone()
    model.set_model_attn2_patch(lambda n, context, value, options: (n, context * 1.1, value * 0.9))
    return model


def with_text_patch_by_level(model):
    """A node that changes the prompt as sampling goes on."""
    model = model.clone()

    def patch(n, context, value, options):
        return n, context * (1 + options["sigmas"][0] / 10), value

    model.set_model_attn2_patch(patch)
    return model


def with_changing_context(model):
    """A node that changes the prompt before the U-Net, at every step."""
    model = model.clone()

    def wrapper(apply, arguments):
        c = arguments["c"] | {"c_crossattn": arguments["c"]["c_crossattn"] * (1 + arguments["timestep"][0] / 10)}
        return apply(arguments["input"], arguments["timestep"], **c)

    model.set_model_unet_function_wrapper(wrapper)
    return model


def image_prompt(previous=None):
    """A replacement that adds attention to two tokens of its own, as IP-Adapter does, behind what was there."""

    def replacement(query, key, value, options):
        own = torch.ones(len(query), 2, query.shape[-1]) * 0.3
        heads = options["n_heads"]
        plain = optimized_attention if previous is None else previous
        earlier = plain(query, key, value, heads) if previous is None else previous(query, key, value, options)
        return earlier + optimized_attention(query, own, own, heads)

    return replacement


def with_image_prompt(model):
    model = model.clone()
    slots = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for key in (("input", 1), ("middle", 0), ("output", 1)):
        model.set_model_attn2_replace(image_prompt(slots.get(key)), *key)
    return model


def with_mask(model):
    settings = counting.widgets(CrossAttentionMask)
    mask = torch.ones(1, 8, 8).tril()
    return CrossAttentionMask.execute(model, mask, tokens=None, **settings).args[0]


OTHERS = [with_lora, with_text_patch, with_text_patch_by_level, with_changing_context, with_image_prompt, with_mask]


@pytest.mark.parametrize("other", OTHERS)
def test_beside_other_nodes_the_picture_is_theirs_before_and_after(model, other):
    wanted = sample(other(model), *prompts())
    assert (wanted - sample(model, *prompts())).norm() > 1e-4 * wanted.norm()
    assert torch.equal(sample(cache_context(other(model)), *prompts()), wanted)
    after = sample(other(cache_context(model)), *prompts())
    if other is with_mask:  # which adds what it changes to an earlier replacement's result: equal but for rounding
        assert (after - wanted).norm() < 1e-5 * wanted.norm()
    else:
        assert torch.equal(after, wanted)


def test_beside_an_image_prompt_the_projections_still_run_once(model):
    _, kept = projected(cache_context(with_image_prompt(model)), *prompts())
    assert kept.count(20) == len(kept) // STEPS


def test_a_prompt_with_a_lora_of_its_own_is_not_kept(model):
    positive, negative = prompts()
    hooks = comfy.hooks.create_hook_lora(tiny_models.lora(model), 1.0, 0.0)
    registered = model.clone()
    registered.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    hooked = [[tensor, extra | {"hooks": hooks}] for tensor, extra in positive]
    wanted = sample(registered, hooked, negative)
    found, tokens = projected(cache_context(registered), hooked, negative)
    assert torch.equal(found, wanted)
    assert set(tokens) == {20}


def test_what_has_no_room_is_not_kept(model, monkeypatch):
    monkeypatch.setattr(context_cache, "free_memory", lambda device: 1000)
    found, tokens = projected(cache_context(model), *prompts())
    assert set(tokens) == {20}
    assert torch.equal(found, sample(model, *prompts()))


def test_a_context_that_always_changes_is_soon_not_kept_any_more(model, monkeypatch):
    kept = []
    find = context_cache.Memory.find
    monkeypatch.setattr(context_cache.Memory, "find", lambda *a: kept.append(find(*a)) or kept[-1])
    sample(cache_context(with_changing_context(model)), *prompts(), steps=context_cache.KINDS + 4)
    assert kept[0].keep
    assert not kept[-1].keep
    assert not kept[-1].pairs


def called(run):
    """The options of a model call in a run."""
    return {host_call.NAME: SimpleNamespace(run=run)}


def test_where_a_gradient_is_wanted_nothing_is_kept(model):
    patched = cache_context(model)
    find, context = patched.get_wrappers("diffusion_model", NAME)[0], torch.zeros(1, 5, 24)
    assert find.call(called(host.Run({"positive": []})), context).kept.keep
    with torch.inference_mode(False), torch.enable_grad(), CountProjections(model) as count:
        call = find.call(called(host.Run({"positive": []})), context)
    assert not call.kept.keep
    assert count.tokens == []


@pytest.mark.parametrize("options", [{}, called(host.Run())], ids=["a bare model call", "a call without a run"])
def test_outside_of_a_run_nothing_is_kept(model, options):
    find = cache_context(model).get_wrappers("diffusion_model", NAME)[0]
    assert not find.call(options, torch.zeros(1, 5, 24)).kept.keep


# ---- prompts that were filled up


def uneven(length=20, tokens=7):
    """(CONDITIONING of `tokens` tokens, the same repeated to a length, how it is told)."""
    short = tiny_models.prompt(2, tokens)
    long = repeated(short[0][0], length)
    return short, [[long, {}]], Padded(long, length - length % tokens)


@pytest.mark.parametrize("beside", [lambda model: model, with_image_prompt])
def test_the_filling_does_not_count(model, beside):
    short, long, padded = uneven()
    positive = tiny_models.prompt(1, 20)
    model = beside(model)
    wanted = sample(model, positive, short)
    found, tokens = projected(cache_context(model, (padded,)), positive, long)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (sample(cache_context(model), positive, long) - wanted).norm() > 1e-5 * wanted.norm()
    assert tokens.count(20) == len(tokens) // STEPS


def test_the_filling_does_not_count_where_the_host_repeats_it_again(model):
    short, long, padded = uneven()
    positive = tiny_models.prompt(1, 40)
    found = sample(cache_context(model, (padded,)), positive, long)
    torch.testing.assert_close(found, sample(model, positive, short), rtol=1e-5, atol=1e-5)


def test_prompts_are_told_one_after_another(model):
    _, long, padded = uneven()
    positive = tiny_models.prompt(1, 20)
    twice = cache_context(cache_context(model, (padded,)), ())
    assert torch.equal(sample(twice, positive, long), sample(cache_context(model, (padded,)), positive, long))
    assert len(twice.model_options["transformer_options"]["patches"]["attn2_patch"]) == 1


# ---- what a step costs


class CountThirdCall(counting.CountCall):
    """Counts a call of which the run knows the like."""

    def __call__(self, model, x, sigmas, extra_args, *rest, **named):
        model(x, x.new_ones(len(x)), **extra_args)
        return super().__call__(model, x, sigmas, extra_args, *rest, **named)


def step(model, family, tokens):
    """A guided step that is not the first, with prompts of so many tokens."""
    with counting.meta_host() as answers:
        count, prompt = CountThirdCall(model.model, answers), family.prompt(tokens)
        sigmas = torch.tensor((1.0, 0.0))
        host.sample(model, count, family.latent(), sigmas=sigmas, positive=prompt, negative=prompt, guidance=7.5)
    return count.cost


def ratio(cost, than):
    return max(cost.h200 / than.h200, cost.rtx4090 / than.rtx4090)


@pytest.fixture(scope="module")
def full_size():
    family = counting.FAMILIES["SDXL"]
    return counting.build(family), family


@pytest.mark.parametrize(("tokens", "goal"), [(1000, 1.06), (5000, 1.30)])
def test_a_long_prompt_costs_little_more_than_a_plain_one(full_size, monkeypatch, tokens, goal):
    monkeypatch.setattr(context_cache, "free_memory", lambda device: 1e15)
    model, family = full_size
    plain, full = step(model, family, 77), step(model, family, tokens)
    cost = step(cache_context(model), family, tokens)
    assert ratio(cost, plain) <= goal
    assert ratio(full, plain) > 1.08
    assert cost.waits <= full.waits + 1
