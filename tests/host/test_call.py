"""One run and one model call, as they are told to techniques by a real sampler."""

import harness
import pytest
import tiny_models
import tiny_transformers
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from cross_attention import hidden_words
from palimpsest.nodes import host
from palimpsest.nodes.host import call as calls
from palimpsest.nodes.host.areas import Area

pytestmark = pytest.mark.usefixtures("inference")


class Look:
    """attn2 replacement that notes the call it is in and leaves the layer alone."""

    def __init__(self):
        self.seen = []

    def __call__(self, query, key, value, options, **_):
        self.seen.append(host.call_of(options))
        return host.run_attention(options, None, query, key, value)


def looked_at(model):
    patched, look = model.clone(), Look()
    host.observe(patched)
    host.replace_attention(patched, "attn2", host.cross_attention_layers(model), lambda earlier: look)
    return patched, look


def sample(model, positive, negative, steps=2, pictures=2):
    return harness.sample_noise(model, harness.noise(pictures=pictures, seed=1), positive, negative, steps=steps)


def test_a_call_tells_prompts_rows_and_level_and_changes_nothing():
    model = tiny_models.unet()
    positive, negative = tiny_models.prompt(1), tiny_models.prompt(2)
    plain = sample(model, positive, negative)
    patched, look = looked_at(model)
    assert torch.equal(sample(patched, positive, negative), plain)
    first = look.seen[0]
    assert (first.pictures, first.chunks, first.latent) == (2, 2, tiny_models.latent(2)["samples"].shape[-2:])
    assert sorted(prompt.negative for prompt in first.prompts) == [False, True]
    assert first.text_length == positive[0][0].shape[1]
    levels = list(dict.fromkeys(call.sigma for call in look.seen))
    assert len(levels) == 2
    assert levels == sorted(levels, reverse=True)
    assert torch.equal(sample(model, positive, negative), plain)


def test_all_layers_of_a_call_share_it_and_all_calls_of_a_run_share_the_run():
    patched, look = looked_at(tiny_models.unet())
    sample(patched, tiny_models.prompt(1), tiny_models.prompt(2))
    layers = len(host.cross_attention_layers(tiny_models.unet()))
    assert len({id(call) for call in look.seen}) == len(look.seen) // layers
    assert len({id(call.run) for call in look.seen}) == 1
    first = look.seen[0].run
    sample(patched, tiny_models.prompt(1), tiny_models.prompt(2))
    assert look.seen[-1].run is not first


def test_what_is_kept_is_made_once_and_goes_with_its_run():
    run, made = calls.Run(), []
    for _ in range(2):
        assert run.kept("a", lambda: made.append(1) or "thing") == "thing"
    assert made == [1]
    assert calls.Run().kept("a", lambda: "another") == "another"


def test_nothing_stays_on_the_model_behind_a_run():
    patched, _ = looked_at(tiny_models.unet())
    sample(patched, tiny_models.prompt(1), tiny_models.prompt(2))
    assert not any(str(key).startswith("palimpsest") for key in patched.model_options["transformer_options"])


def test_areas_are_cut_as_the_host_cuts_them():
    conds = [[{"uuid": "a", "area": (4, 8, 6, 2)}, {"uuid": "b"}], None]
    assert calls.areas_of(conds, (8, 8)) == {"a": Area(2, 6, 6, 2, (8, 8))}


def test_an_area_of_a_clip_is_that_of_its_pictures_and_one_of_some_frames_is_refused():
    """Four numbers cover all frames, six say which; a latent without frames takes the first of each."""
    for area, sides in (((4, 8, 6, 2), (3, 8, 8)), ((3, 4, 8, 0, 6, 2), (3, 8, 8)), ((4, 8, 1, 6, 2, 0), (8, 8))):
        assert calls.areas_of([[{"uuid": "a", "area": area}]], sides) == {"a": Area(2, 6, 6, 2, (8, 8))}
    for area in ((2, 4, 8, 0, 6, 2), (3, 4, 8, 1, 6, 2)):
        with pytest.raises(ValueError, match=r"frames \d to \d of a latent of 3.*set temporal to 1 and z to 0"):
            calls.areas_of([[{"uuid": "a", "area": area}]], (3, 8, 8))


def test_a_mask_lies_in_the_hosts_area_for_video_as_in_one_for_pictures():
    model, (positive, negative) = tiny_transformers.model("qwen"), hidden_words.both("qwen")
    patched = hidden_words.apply(model, hidden_words.half(), hidden_words.words_of(positive))
    share = ("percentage", 1.0, 0.5, 0.5, 0.0, 0.5, 0.5)
    found = []
    for area in (share, (6, 4, 6, 4)):
        limited = [[text, extra | {"area": area, "strength": 1.0}] for text, extra in positive]
        found.append(tiny_transformers.sample(patched, limited, negative, tiny_transformers.latent("qwen")))
    assert torch.equal(*found)


def test_a_call_knows_the_area_of_its_prompt():
    patched, look = looked_at(tiny_models.unet())
    (text, extra), *_ = tiny_models.prompt(1)
    limited = [[text, extra | {"area": (4, 4, 2, 2), "strength": 1.0}]]
    sample(patched, limited, tiny_models.prompt(2))
    areas = [area for call in look.seen for area in call.areas if area is not None]
    assert areas
    assert {(area.height, area.width, area.top, area.left) for area in areas} == {(4, 4, 2, 2)}
    assert any(call.has_areas for call in look.seen)


def test_observing_twice_adds_nothing():
    from comfy.patcher_extension import WrappersMP

    patched = tiny_models.unet().clone()
    host.observe(patched)
    host.observe(patched.clone())
    host.observe(patched)
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):
        assert len(patched.get_wrappers(kind, calls.NAME)) == 1


def test_a_check_at_the_start_of_a_run_can_refuse_it():
    patched = tiny_models.unet().clone()

    def refuse(guider, run):
        assert {cond["uuid"] for cond in run.every_cond}
        raise ValueError("not this one")

    host.each_run(patched, "palimpsest_test", refuse)
    with pytest.raises(ValueError, match="not this one"):
        sample(patched, tiny_models.prompt(1), tiny_models.prompt(2))
    assert calls.RUN not in patched.model_options["transformer_options"]


def test_a_transformers_call_tells_where_the_pictures_tokens_stand():
    call = calls.ModelCall(
        sigmas=torch.tensor([0.5]), prompts=(None,), areas=(None,), pictures=1, latent=(9, 16), text_length=77,
        model=None, run=calls.Run(),
    )  # fmt: skip
    assert call.picture_tokens(2) == slice(77, 77 + 5 * 8)
    assert call.picture_tokens(1) == slice(77, 77 + 9 * 16)


# ---- the window


def test_a_window_is_open_at_its_noisier_end_only_and_empty_ones_are_refused():
    window = host.Window(2.0, 1.0)
    assert [sigma in window for sigma in (2.1, 2.0, 1.5, 1.0)] == [False, True, True, False]
    model = tiny_models.unet()
    assert host.Window.of(model, 0.0, 1.0).always
    assert not host.Window.of(model, 0.0, 0.5).always
    for start, end in ((0.5, 0.5), (0.7, 0.2)):
        with pytest.raises(ValueError, match="leave no step between them"):
            host.Window.of(model, start, end)


@pytest.mark.parametrize("shift", [2.66, 3.0, 1.15])
def test_a_start_of_0_has_the_first_step_at_every_shift(shift):
    """A flow's noisiest level may be 1.0000001 in float32, where the host's share of 0 is 1."""
    model = ModelSamplingSD3().patch(tiny_transformers.model("sd3"), shift)[0]
    noisiest = float(model.get_model_object("model_sampling").sigma_max)
    assert noisiest in host.Window.of(model, 0.0, 0.5)
    assert noisiest not in host.Window.of(model, 0.1, 0.5)


def test_outside_of_a_sampler_only_what_always_acts_acts():
    assert host.acts(host.Window(2.0, 1.0, always=True), {})
    assert not host.acts(host.Window(2.0, 1.0), {})


def test_a_list_of_layers_has_one_grammar():
    parts = host.read_parts("input 7-8, Middle \uff0c output 3.1,out", "layers", "middle")
    assert [(p.block, p.first, p.last, p.index) for p in parts] == [
        ("input", 7, 8, None), ("middle", None, None, None), ("output", 3, 3, 1), ("out", None, None, None)
    ]  # fmt: skip
    assert parts[0].means("input", 8, 0)
    assert not parts[0].means("input", 9, 0)
    assert not parts[2].means("output", 3, 0)
    for wrong, told in (("", "layers is empty"), ("middel", "'middel' names no layer")):
        with pytest.raises(ValueError, match=told):
            host.read_parts(wrong, "layers", "middle")
