"""Attention Fusion in the host: the maps against those written down, identity, rows, prompts, batches, refusals."""

import itertools
import math
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import tiny_models
import torch
from comfy import sd1_clip, sdxl_clip
from comfy_extras.nodes_custom_sampler import SamplerCustom
from comfy_extras.nodes_hypertile import HyperTile
from palimpsest.kernels import attention_fusion as maths
from palimpsest.nodes.attention_fusion import source as fusion_source
from palimpsest.nodes.attention_fusion.apply import CACHED, SAME_STEP
from palimpsest.nodes.attention_fusion.fusion import PREFIX
from palimpsest.nodes.attention_fusion.prompts import read_prompts
from palimpsest.nodes.contextdiff.adapter import ContextAdapter
from palimpsest.nodes.contextdiff.network import AdapterConfig, closed
from palimpsest.nodes.contextdiff.nodes import ContextSampler
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.feature_blend import cache as feature_cache
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.host import model as host
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.video.nodes import AttentionFusion, VideoAttention

STEPS, GUIDANCE = 4, 3.0
SOURCE, EDIT = "a brown dog in the park", "a very red dog in the park"
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
CLIPS = {
    "sd15": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
    "sdxl": (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer),
}
families = pytest.mark.parametrize("family", ["sd15", "sdxl"])
sources = pytest.mark.parametrize("source_maps", [CACHED, SAME_STEP])


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class Target:
    """What the host's CLIP asks of a text encoder's family."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


class WideClip:
    """The host's own tokenizers in front of texts of the tiny U-Nets' width: a random row for each token and place."""

    def __init__(self, clip):
        self.clip, self.tokenizer = clip, clip.tokenizer

    def tokenize(self, text, **options):
        return self.clip.tokenize(text, **options)

    def encode_from_tokens_scheduled(self, tokens):
        numbers = [int(token[0]) for chunk in next(iter(tokens.values())) for token in chunk]
        rows = [
            torch.randn(tiny_models.SD15["context_dim"], generator=torch.Generator().manual_seed(number * 1000 + place))
            for place, number in enumerate(numbers)
        ]
        pooled = {"pooled_output": rows[1].repeat(54)[None, :1280]} if "g" in tokens else {"pooled_output": None}
        return [[torch.stack(rows)[None], pooled]]


@pytest.fixture(scope="module")
def clips():
    """A text encoder by family."""
    made = {}
    for family, (model, tokenizer) in CLIPS.items():
        options = {f"clip_{name}_model_config": SMALL for name in "lg"}
        with torch.inference_mode():
            made[family] = WideClip(comfy.sd.CLIP(Target(model, tokenizer), model_options=options))
    return made


@pytest.fixture(scope="module")
def setup(clips):
    """By family and batch: (model, clip, latent, trajectory, inverted noise)."""
    made = {}

    def get(family="sd15", pictures=1, height=8, width=8):
        name = family, pictures, height, width
        if name not in made:
            model, latent = tiny_models.unet(family), tiny_models.latent(pictures, height, width)
            prompt = clips[family].encode_from_tokens_scheduled(clips[family].tokenize(SOURCE))
            trajectory, noise, *_ = tiny_models.execute(
                Invert, model=model, latent=latent, positive=prompt, steps=STEPS, reconstruction_guidance=0.0
            )
            made[name] = model, clips[family], latent["samples"], trajectory, noise["samples"]
        return made[name]

    return get


def fuse(model, clip, trajectory, **settings):
    """(patched model, positive, report) at the node's defaults except `settings`."""
    texts = {"source_text": SOURCE, "edit_text": EDIT}
    return tiny_models.execute(AttentionFusion, model=model, clip=clip, trajectory=trajectory, **texts | settings)


def video(model, **settings):
    return tiny_models.execute(VideoAttention, model=model, **settings)[0]


def empty(clip):
    return clip.encode_from_tokens_scheduled(clip.tokenize(""))


def sample(model, noise, positive, negative, cfg=GUIDANCE, sampler="euler", steps=STEPS):
    sampling = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, "normal")
    return sampling.sample(
        torch.zeros_like(noise), positive, negative, cfg, latent_image=noise, disable_pbar=True, seed=1
    )


def acts(a, b):
    return bool(torch.isfinite(a).all()) and float((a - b).norm()) > 1e-5 * float(b.norm())


# ---- prompts


@families
def test_words_of_both_prompts_are_linked_and_the_hosts_tokens_too(clips, family):
    prompts = read_prompts(clips[family], SOURCE, EDIT, "", "their own attention", 1.0)
    pairs = {0: 0, 1: 1, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9}  # start, a, dog in the park, end, first padding
    for source, edit in pairs.items():
        assert prompts.link[source, edit] == 1
    assert prompts.link.shape == (77, 77)
    assert prompts.own.nonzero()[:, 0].tolist() == [2, 3]  # very red
    assert prompts.link.sum() == 75
    assert "5 of 7 words are the source's; new: very, red; gone: brown" in prompts.report


def test_emphasis_and_replacement(clips):
    prompts = read_prompts(clips["sd15"], SOURCE, "a red dog in the park", "", "attention of the words they replace", 3)
    assert prompts.link[2, 2] == 3
    assert prompts.own.count_nonzero() == 0
    kept = read_prompts(clips["sd15"], SOURCE, "a red dog in the park", "", "their own attention", 3.0)
    assert kept.own.nonzero()[:, 0].tolist() == [2]
    assert kept.own[2] == 3


def test_a_shorter_edit_leaves_its_last_padding_to_itself(clips):
    prompts = read_prompts(clips["sd15"], SOURCE, "a dog", "", "their own attention", 1.0)
    assert prompts.link[[0, 1, 3, 7], [0, 1, 2, 3]].eq(1).all()  # start, a, dog, end
    assert prompts.own.nonzero()[:, 0].tolist() == [73, 74, 75, 76]


def test_a_long_edit_is_linked_chunk_by_chunk(clips):
    long = SOURCE + " and" * 90
    prompts = read_prompts(clips["sd15"], SOURCE, long, "", "their own attention", 1.0)
    assert prompts.link.shape == (77, 154)
    assert prompts.link[1:7, 1:7].diagonal().eq(1).all()
    assert prompts.own[77:].eq(1).all()  # the source has no second chunk


def test_a_blend_word_that_is_not_in_the_source_is_refused(clips):
    with pytest.raises(ValueError, match="'red' is not in the prompt"):
        read_prompts(clips["sd15"], SOURCE, EDIT, "red", "their own attention", 1.0)


def test_without_a_text_encoder_it_says_so():
    with pytest.raises(ValueError, match="this checkpoint holds no text encoder"):
        read_prompts(None, SOURCE, EDIT, "", "their own attention", 1.0)


# ---- identity


@families
@sources
def test_with_both_fractions_0_it_is_the_plain_model_bit_for_bit(setup, family, source_maps):
    model, clip, _, trajectory, noise = setup(family)
    patched, positive, report = fuse(model, clip, trajectory, self_until=0.0, cross_until=0.0, source_maps=source_maps)
    assert "nothing is fused" in report
    assert torch.equal(sample(patched, noise, positive, empty(clip)), sample(model, noise, positive, empty(clip)))


@families
def test_recorded_and_beside_each_step_are_the_same_and_the_model_stays_itself(setup, family):
    model, clip, _, trajectory, noise = setup(family, 2)
    results = []
    for source_maps in (CACHED, SAME_STEP):
        patched, positive, _ = fuse(model, clip, trajectory, source_maps=source_maps, blend_words="dog", self_until=1.0)
        plain = sample(model, noise, positive, empty(clip))
        results.append(sample(patched, noise, positive, empty(clip)))
        assert torch.equal(sample(model, noise, positive, empty(clip)), plain)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert acts(results[0], plain)


def fusion_of(patched):
    """What the last Attention Fusion put on a model."""
    wrappers = patched.wrappers["predict_noise"]
    return wrappers[[name for name in wrappers if name.startswith(PREFIX)][-1]][0].fusion


@pytest.mark.parametrize("layers", ["all", "decoder"])
def test_the_memory_that_is_stated_is_what_it_takes(setup, layers):
    """Also behind Video Attention, which gathers the frames' keys afterwards."""
    model, clip, _, trajectory, _ = setup("sdxl", 2, 11, 9)
    patched, _, report = fuse(video(model), clip, trajectory, layers=layers, cross_until=1.0, source_maps=CACHED)
    fusion = fusion_of(patched)
    assert fusion.source.bytes == fusion_source.expected_bytes(model, fusion)
    assert f"{fusion.source.bytes / 1e6:.1f} MB" in report


def test_what_does_not_fit_is_refused_or_runs_beside_each_step(setup, monkeypatch):
    model, clip, _, trajectory, _ = setup("sd15", 3)
    needed = fusion_of(fuse(model, clip, trajectory, source_maps=CACHED)[0]).source.bytes
    monkeypatch.setattr(feature_cache, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="set source_maps to 'same step'"):
        fuse(model, clip, trajectory, source_maps=CACHED)
    patched, _, report = fuse(model, clip, trajectory)
    assert isinstance(fusion_of(patched).source, fusion_source.SameStep)
    assert "one more row" in report
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 4 * needed)
    assert isinstance(fusion_of(fuse(model, clip, trajectory)[0]).source, fusion_source.Cached)


@families
def test_on_the_trajectory_with_the_sources_prompt_every_layer_gives_what_it_gave(setup, family):
    """The first step stands on the recorded latent: fused and plain attention are the same there, up to rounding."""
    model, clip, _, trajectory, noise = setup(family)
    patched, positive, _ = fuse(model, clip, trajectory, edit_text=SOURCE, self_until=1.0, cross_until=1.0)
    found = []
    for each in (patched, model):
        each = each.clone()
        each.set_model_sampler_post_cfg_function(lambda args: found.append(args["denoised"]) or args["denoised"])
        sample(each, noise, positive, empty(clip))
    torch.testing.assert_close(found[0], found[STEPS], rtol=1e-4, atol=1e-4)
    assert acts(found[1], found[STEPS + 1])


# ---- the maps


def spied(patched, name, layer):
    """What one layer's replacement is given and gives: a list of (query, key, value, out, heads)."""
    seen, ours = [], patched.model_options["transformer_options"]["patches_replace"][name][layer.key[:2]]

    def spy(query, key, value, options):
        out = ours(query, key, value, options)
        if host.layer_key(options) == layer.key:
            seen.append((query, key, value, out, options["n_heads"]))
        return out

    getattr(patched, f"set_model_{name}_replace")(spy, *layer.key[:2])
    return seen


def shares(query, key, heads):
    q, k = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)


def outcome(weights, value, heads):
    v = value.double().unflatten(-1, (heads, -1)).transpose(1, 2)
    return (weights @ v).transpose(1, 2).flatten(2)


def assert_close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@families
@pytest.mark.parametrize("blend_words", ["", "dog"])
def test_layers_do_what_the_written_down_maps_do(setup, monkeypatch, family, blend_words):
    model, clip, _, trajectory, noise = setup(family, 2)
    settings = {"blend_words": blend_words, "self_until": 1.0, "source_maps": SAME_STEP}
    patched, positive, _ = fuse(model, clip, trajectory, emphasis=2.0, **settings)
    prompts = read_prompts(clip, SOURCE, EDIT, blend_words, "their own attention", 2.0)
    layers = host.self_attention_layers(model)
    own, crosses = spied(patched, "attn1", layers[-1]), [spied(patched, "attn2", layer) for layer in layers]
    masses = []

    def every_other(mass, threshold):
        masses.append(mass)
        return (torch.arange(mass.numel()) % 2).reshape(mass.shape).to(mass)

    monkeypatch.setattr(maths, "blend_mask", every_other)
    sample(patched, noise, positive, empty(clip))
    (q_s, k_s, *_), (q, k, v, out, heads) = own[:2]  # the source's pass, then the edit's: negative rows first
    assert (len(q_s), len(q)) == (2, 4)
    assert_close(out[:2], outcome(shares(q[:2], k[:2], heads), v[:2], heads))
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if blend_words:
        places = q.shape[1]
        assert masses[0].flatten(1).shape == (2, places)  # the grid nearest to 16 x 16 is the finest
        mask = (torch.arange(2 * places) % 2).reshape(2, 1, places, 1).double()
        recorded = [
            shares(*seen[0][:2], seen[0][4])[..., 3].mean(1) for seen in crosses if seen[0][0].shape[1] == places
        ]
        assert_close(masses[0].flatten(1), torch.stack(recorded).mean(0))
    fused = maths.fused_self_map(shares(q_s, k_s, heads), shares(q[2:], k[2:], heads), mask)
    assert_close(out[2:], outcome(fused, v[2:], heads))

    (q_s, k_s, *_), (q, k, v, out, heads) = crosses[-1][:2]
    assert_close(out[:2], outcome(shares(q[:2], k[:2], heads), v[:2], heads))
    both = shares(q_s, k_s, heads), shares(q[2:], k[2:], heads)
    fused = maths.fused_cross_map(*both, prompts.link.double(), prompts.own.double())
    assert_close(out[2:], outcome(fused, v[2:], heads))


# ---- rows, prompts, sizes


def test_prompts_of_different_lengths_that_share_a_call(setup):
    """The host repeats the shorter one's tokens; the result is that of a call of its own."""
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory, self_until=1.0, cross_until=1.0)
    long = clip.encode_from_tokens_scheduled(clip.tokenize("bad" + " and" * 90))
    assert long[0][0].shape[1] == 2 * positive[0][0].shape[1]
    together = sample(patched, noise, positive, long)
    apart = patched.clone()

    def one_by_one(args):
        call = args["input"], args["sigma"], args["model_options"]
        return [comfy.samplers.calc_cond_batch(args["model"], [cond], *call)[0] for cond in args["conds"]]

    apart.set_model_sampler_calc_cond_batch_function(one_by_one)
    torch.testing.assert_close(sample(apart, noise, positive, long), together, rtol=1e-4, atol=1e-4)


def test_other_prompts_in_the_same_call_are_left_alone(setup):
    """A call with a second positive prompt: only the edit's rows differ from the plain model's."""
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    other = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    layer = host.self_attention_layers(model)[0]
    seen, theirs = spied(patched, "attn1", layer), model.clone()
    theirs.set_model_attn1_replace(lambda q, k, v, options: host.run_attention(options, None, q, k, v), *layer.key[:2])
    plain = spied(theirs, "attn1", layer)
    sample(patched, noise, positive + other, empty(clip))
    sample(theirs, noise, positive + other, empty(clip))
    a, b = next(found for found in seen if len(found[0]) == 3), plain[0]
    same = [torch.equal(a[3][row], b[3][row]) for row in range(3)]
    assert sorted(same)[1:] == [True, True]


@pytest.mark.parametrize("size", [(8, 8), (11, 9)])
def test_a_prompt_limited_to_an_area_is_fused_on_its_crop(setup, size):
    model, clip, _, trajectory, noise = setup("sd15", 2, *size)
    patched, positive, _ = fuse(model, clip, trajectory, blend_words="dog", self_until=1.0)
    area = [[positive[0][0], positive[0][1] | {"area": (6, 4, 2, 3), "strength": 1.0}]]
    both = area + clip.encode_from_tokens_scheduled(clip.tokenize("a park"))
    assert acts(sample(patched, noise, both, empty(clip)), sample(model, noise, both, empty(clip)))


def test_an_area_of_full_size_is_no_area(setup):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    whole = [[positive[0][0], positive[0][1] | {"area": (8, 8, 0, 0), "strength": 1.0}]]
    torch.testing.assert_close(
        sample(patched, noise, whole, empty(clip)), sample(patched, noise, positive, empty(clip)), rtol=1e-4, atol=1e-4
    )


def test_a_batch_of_frames_is_fused_frame_by_frame(setup):
    model, clip, _, trajectory, noise = setup("sd15", 3)
    patched, positive, _ = fuse(model, clip, trajectory, blend_words="dog")
    together = sample(patched, noise, positive, empty(clip))
    for i in range(3):
        alone = replace(trajectory, latents=trajectory.latents[:, i : i + 1])
        one, _, _ = fuse(model, clip, alone, blend_words="dog")
        found = sample(one, noise[i : i + 1], positive, empty(clip))
        torch.testing.assert_close(found, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_one_picture_serves_a_batch(setup):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    both = sample(patched, noise.expand(2, -1, -1, -1).contiguous(), positive, empty(clip))
    alone = sample(patched, noise, positive, empty(clip))
    torch.testing.assert_close(both, alone.expand_as(both), rtol=1e-4, atol=1e-4)


def test_a_mask_frees_its_white_part(setup):
    model, clip, _, trajectory, noise = setup()
    keep = {"cross_until": 0.0, "self_until": 1.0}
    patched, positive, _ = fuse(model, clip, trajectory, mask=torch.ones(1, 64, 64), **keep)
    plain = sample(model, noise, positive, empty(clip))
    torch.testing.assert_close(sample(patched, noise, positive, empty(clip)), plain, rtol=1e-5, atol=1e-5)
    held, _, _ = fuse(model, clip, trajectory, **keep)
    black, _, _ = fuse(model, clip, trajectory, mask=torch.zeros(64, 64), **keep)
    a, b = (sample(each, noise, positive, empty(clip)) for each in (held, black))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert acts(a, plain)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers_and_guidance_1(setup, sampler):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    for cfg in (1.0, GUIDANCE):
        found = sample(patched, noise, positive, empty(clip), cfg, sampler, 5)
        assert acts(found, sample(model, noise, positive, empty(clip), cfg, sampler, 5))


@pytest.mark.parametrize(("self_until", "cross_until"), [(0.3, 0.8), (0.8, 0.3), (0.0, 0.5), (0.5, 0.0)])
def test_fractions_that_differ_with_other_steps_than_the_inversions(setup, self_until, cross_until):
    """The nearest recorded level may have been recorded without what is still fused at the sampled one."""
    model, clip, _, trajectory, noise = setup()
    until = {"self_until": self_until, "cross_until": cross_until}
    patched, positive, _ = fuse(model, clip, trajectory, source_maps=CACHED, **until)
    for steps in (3, 7):
        found = sample(patched, noise, positive, empty(clip), steps=steps)
        assert torch.isfinite(found).all()
        assert not torch.equal(found, sample(model, noise, positive, empty(clip), steps=steps))


# ---- beside other nodes


@families
def test_video_attention_in_either_order_gives_the_same(setup, family):
    model, clip, _, trajectory, noise = setup(family, 3)
    inside = {maps: fuse(video(model), clip, trajectory, source_maps=maps) for maps in (CACHED, SAME_STEP)}
    positive = inside[SAME_STEP][1]
    recorded, beside = (sample(patched, noise, positive, empty(clip)) for patched, *_ in inside.values())
    assert acts(recorded, sample(video(model), noise, positive, empty(clip)))
    torch.testing.assert_close(recorded, beside, rtol=1e-6, atol=1e-6)
    outside = video(fuse(model, clip, trajectory, source_maps=SAME_STEP)[0])
    torch.testing.assert_close(sample(outside, noise, positive, empty(clip)), beside, rtol=1e-4, atol=1e-4)


def test_video_attention_behind_recorded_maps_is_refused_with_a_way_out(setup):
    model, clip, _, trajectory, noise = setup("sd15", 3)
    patched, positive, _ = fuse(model, clip, trajectory, source_maps=CACHED)
    with pytest.raises(ValueError, match="put it before this node"):
        sample(video(patched), noise, positive, empty(clip))


def test_two_clips_in_one_batch_are_fused_clip_by_clip(setup):
    model, clip, _, trajectory, noise = setup("sd15", 4)
    patched, positive, _ = fuse(video(model, clip_length=2), clip, trajectory)
    together = sample(patched, noise, positive, empty(clip))
    for first in (0, 2):
        part = replace(trajectory, latents=trajectory.latents[:, first : first + 2])
        one, _, _ = fuse(video(model), clip, part)
        found = sample(one, noise[first : first + 2], positive, empty(clip))
        torch.testing.assert_close(found, together[first : first + 2], rtol=1e-4, atol=1e-4)


@families
def test_with_video_attention_and_the_context_aware_sampler(setup, family):
    """Without a bias the picture is the stock sampler's, bit for bit; with one the adapter acts as well."""
    model, clip, _, trajectory, noise = setup(family, 3)
    config = AdapterConfig.for_model(model, tiny_models.SD15["context_dim"], width=32, depth=1, heads=4)
    adapter = ContextAdapter.new(config)
    for name, parameter in adapter.patcher.model.named_parameters():
        if closed(name.removesuffix(".weight")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    patched, positive, _ = fuse(video(model), clip, trajectory, blend_words="dog")
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)

    def by(strength):
        sampler = tiny_models.execute(ContextSampler, context_adapter=adapter, strength=strength)[0]
        return tiny_models.execute(
            SamplerCustom, model=patched, add_noise=False, noise_seed=0, cfg=GUIDANCE, positive=positive,
            negative=empty(clip), sampler=sampler, sigmas=levels, latent_image={"samples": noise},
        )[0]["samples"]  # fmt: skip

    stock = sample(patched, noise, positive, empty(clip))
    assert torch.equal(by(0.0), stock)
    assert acts(by(1.0), stock)


def test_beside_kv_inversion_a_word_mask_and_feature_blending(setup):
    model, clip, _, trajectory, noise = setup()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(SOURCE))
    kv = tiny_models.execute(
        TuneKV, model=model, trajectory=trajectory, positive=prompt, negative=empty(clip), guidance=GUIDANCE,
        inner_steps=2,
    )[0]  # fmt: skip
    partners = {
        "kv": lambda m: tiny_models.execute(ApplyKV, model=m, kv=kv, source_guidance=4.0)[0],
        "mask": lambda m: tiny_models.execute(CrossAttentionMask, model=m, mask=torch.ones(1, 64, 64).tril())[0],
        "blend": lambda m: tiny_models.execute(
            FeatureBlend, model=m, trajectory=trajectory, positive=prompt, mask=torch.ones(1, 64, 64).tril()
        )[0],
    }
    for partner in partners.values():
        theirs = partner(model)
        patched, positive, _ = fuse(theirs, clip, trajectory, source_maps=SAME_STEP)
        both = sample(patched, noise, positive, empty(clip))
        assert acts(both, sample(theirs, noise, positive, empty(clip)))
        assert acts(both, sample(fuse(model, clip, trajectory)[0], noise, positive, empty(clip)))


def test_two_fusions_after_one_another(setup):
    model, clip, _, trajectory, noise = setup()
    once, positive, _ = fuse(model, clip, trajectory, layers="decoder", self_until=1.0)
    for source_maps in (CACHED, SAME_STEP):
        twice, positive, _ = fuse(once, clip, trajectory, layers="decoder", self_until=1.0, source_maps=source_maps)
        assert torch.isfinite(sample(twice, noise, positive, empty(clip))).all()


def test_nothing_of_a_run_is_left_behind(setup):
    model, clip, _, trajectory, noise = setup()
    patched, positive, _ = fuse(model, clip, trajectory)
    before = set(patched.model_options["transformer_options"])
    first = sample(patched, noise, positive, empty(clip))
    assert set(patched.model_options["transformer_options"]) == before
    assert torch.equal(sample(patched, noise, positive, empty(clip)), first)


@sources
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_cancelling_and_errors_leave_nothing_behind(setup, source_maps, error):
    model, clip, _, trajectory, noise = setup("sd15", 3)
    patched, positive, _ = fuse(video(model), clip, trajectory, source_maps=source_maps)
    before, plain = sample(patched, noise, positive, empty(clip)), sample(model, noise, positive, empty(clip))
    kept, broken, count = set(patched.model_options["transformer_options"]), patched.clone(), itertools.count()

    def stop(args):
        if next(count) == 1:
            raise error
        return args["denoised"]

    broken.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(error):
        sample(broken, noise, positive, empty(clip))
    assert set(broken.model_options["transformer_options"]) == kept
    assert torch.equal(sample(patched, noise, positive, empty(clip)), before)
    assert torch.equal(sample(model, noise, positive, empty(clip)), plain)


def test_cancelling_while_the_source_is_recorded_leaves_the_model_as_it_was(setup):
    model, clip, _, trajectory, noise = setup()
    positive = empty(clip)
    plain = sample(model, noise, positive, positive)
    broken = model.clone()

    def stop(args):
        raise comfy.model_management.InterruptProcessingException

    broken.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fuse(broken, clip, trajectory, source_maps=CACHED)
    assert torch.equal(sample(model, noise, positive, positive), plain)


# ---- refusals


def test_what_cannot_be_fused_is_refused_in_a_sentence(setup):
    model, clip, _, trajectory, noise = setup("sd15", 2)
    patched, positive, _ = fuse(model, clip, trajectory)
    with pytest.raises(ValueError, match="the trajectory holds 2 pictures, the sampled batch has 3"):
        sample(patched, noise[:1].expand(3, -1, -1, -1).contiguous(), positive, empty(clip))
    with pytest.raises(ValueError, match="recorded for a latent of 8 x 8, sampling runs at 12 x 8"):
        sample(patched, torch.randn(2, 4, 8, 12), positive, empty(clip))
    with pytest.raises(ValueError, match="no sampled prompt is the edit's of Attention Fusion"):
        sample(patched, noise, tiny_models.prompt(5), empty(clip))
    with pytest.raises(ValueError, match="recorded with another model architecture"):
        fuse(tiny_models.unet("sdxl"), clip, trajectory)
    with pytest.raises(ValueError, match="mask is empty or holds NaN"):
        fuse(model, clip, trajectory, mask=torch.full((1, 8, 8), torch.nan))
    tiled = tiny_models.execute(HyperTile, model=patched, tile_size=32, swap_size=2, max_depth=0)[0]
    with pytest.raises(ValueError, match="another node merges or tiles them"):
        sample(tiled, noise, positive, empty(clip))
    late = replace(trajectory, sigmas=tuple(sigma / 100 for sigma in trajectory.sigmas))
    with pytest.raises(ValueError, match="no level of the trajectory lies within self_until and cross_until"):
        fuse(model, clip, late)
    with pytest.raises(ValueError, match="no level of the trajectory lies within cross_until: raise"):
        fuse(model, clip, late, self_until=1.0)


def test_cached_maps_of_an_inpaint_model_are_refused_and_beside_each_step_they_work(clips, setup):
    model = tiny_models.unet("sd15-inpaint")
    trajectory = setup()[3]
    trajectory = replace(trajectory, layout=host.layout_fingerprint(model))
    with pytest.raises(ValueError, match="set source_maps to 'same step'"):
        fuse(model, clips["sd15"], trajectory, source_maps=CACHED)
    patched, positive, _ = fuse(model, clips["sd15"], trajectory)
    noise = setup()[4]
    assert torch.isfinite(sample(patched, noise, positive, empty(clips["sd15"]))).all()
