"""Attention Map and Find Words in the host: what is recorded, and whose it is."""

import comfy.model_management
import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from attention_map.recorded import read
from comfy.ldm.modules.attention import optimized_attention
from palimpsest.kernels.attention_map import attention_mass
from palimpsest.nodes import host
from palimpsest.nodes.attention_map import finding, recorder
from palimpsest.nodes.attention_map import nodes as attention_map
from palimpsest.nodes.attention_map.nodes import AttentionMap, FindWords
from palimpsest.nodes.attention_map.record import KEPT_RUNS, AttentionRecord, RecordedRun, span
from palimpsest.nodes.attention_map.recorder import LAYERS, NAME
from palimpsest.nodes.cross_attention.masking import MaskSettings, mask_words
from palimpsest.nodes.inversion import ddim as inversion
from palimpsest.nodes.words import ChosenWords

import nodes

STEPS = 3

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return tiny_models.unet()


def select(positive, words=("cat", "red"), positions=((2, 3), (1,))):
    """ChosenWords of a CONDITIONING, as Select Words gives them."""
    return ChosenWords(tuple(words), tuple(positions), positive[0][0])


def record(model, tokens, **settings):
    """(model that records, record)."""
    return tiny_models.execute(AttentionMap, model=model, tokens=tokens, **settings)


def sample(model, positive, negative=None, seed=1, cfg=3.0, latent=None, sampler="euler", steps=STEPS):
    """LATENT samples by the host's own sampler."""
    start = (latent or tiny_models.latent())["samples"]
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    both, others = (positive, negative or tiny_models.prompt(2)), {"cfg": cfg, "sampler": sampler, "seed": seed}
    return harness.sample(model, start, *both, noise=noise, steps=steps, **others)


def levels(model, positive, tokens=None, **settings):
    """The maps of one run by grid."""
    patched, found = record(model, tokens or select(positive))
    return found.of(sample(patched, positive, **settings)).levels


def assert_same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for grid in a:
        torch.testing.assert_close(a[grid], b[grid], rtol=0, atol=tolerance)


def watch(model, tokens):
    """A clone whose cross-attention keeps, by grid, the words' mass (1, W, N) in the positive rows of every call."""
    seen, watched = {}, model.clone()

    def look(query, key, value, options):
        rows = [i for i, which in enumerate(options["cond_or_uncond"]) if which == 0]
        mass = attention_mass(query[rows].double(), key[rows].double(), tokens.positions, options["n_heads"])
        seen.setdefault(tuple(options["activations_shape"][-2:]), []).append(mass.mT)
        return optimized_attention(query, key, value, options["n_heads"], transformer_options=options)

    for layer in host.cross_attention_layers(model):
        watched.set_model_attn2_replace(look, *layer.key)
    return watched, seen


def assert_as_seen(found, seen, calls):
    """Recorded maps are the mean over layers of what was seen in so many model calls."""
    assert found.keys() == seen.keys()
    for grid, level in found.items():
        layers = torch.stack(seen[grid]).unflatten(0, (calls, -1)).mean(1)
        torch.testing.assert_close(level, layers.unflatten(-1, grid).float(), rtol=0, atol=1e-6)


# ---- recording ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_record_is_the_mean_of_what_all_layers_attend_to(family):
    model, positive = tiny_models.unet(family), tiny_models.prompt(1, family=family)
    watched, seen = watch(model, select(positive))
    found = levels(watched, positive, negative=tiny_models.prompt(2, family=family))
    assert_as_seen(found, seen, STEPS)
    assert all(level.shape == (STEPS, 1, 2, *grid) for grid, level in found.items())


def test_recording_changes_nothing(model):
    positive = tiny_models.prompt(1)
    before = sample(model, positive)
    patched, _ = record(model, select(positive))
    assert torch.equal(sample(patched, positive), before)
    assert torch.equal(sample(model, positive), before)
    options = patched.model_options["transformer_options"]
    assert not any(str(name).startswith(("palimpsest.", NAME)) for name in options)


def test_masks_are_seen_on_either_side_of_the_recorder(model):
    positive = tiny_models.prompt(1)
    tokens, mask = select(positive), torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1

    def masked(model):
        return mask_words(model, mask, select(positive, ("cat",), ((2, 3),)), MaskSettings())

    both = []
    for first, second in ((masked, lambda m: record(m, tokens)), (lambda m: record(m, tokens), masked)):
        made = first(model)
        made, found = second(made) if first is masked else (second(made[0]), made[1])
        samples = sample(made, positive)
        both.append(found.of(samples).levels)
        *_, leakage, _ = read(found, samples, mask=mask, words="cat", levels="1/1 of the latent")
        assert leakage < 0.05  # the rest is the growing of the maps to the picture's size
        *_, free, _ = read(found, samples, mask=mask, words="red", levels="1/1 of the latent")
        assert free > 0.3
        assert both[-1][8, 8][:, :, 0, :, 4:].abs().max() < 1e-6
    assert_same(*both)


def test_words_are_summed_over_all_copies_of_a_repeated_prompt(model):
    positive = tiny_models.prompt(1)
    alone, beside = (levels(model, positive, negative=tiny_models.prompt(2, n), steps=1) for n in (7, 14))
    assert_same(alone, beside)


def test_words_are_found_behind_another_prompt(model):
    positive = tiny_models.prompt(1)
    (joined,) = nodes.ConditioningConcat().concat(tiny_models.prompt(5), positive)
    moved = ChosenWords(("cat", "red"), ((9, 10), (8,)), joined[0][0])
    assert_same(levels(model, joined, select(positive)), levels(model, joined, moved))


def test_only_prompts_that_hold_the_words_count(model):
    positive, other = tiny_models.prompt(1), tiny_models.prompt(5)
    both = nodes.ConditioningCombine().combine(other, positive)[0]
    assert_same(levels(model, both, select(positive), steps=1), levels(model, positive, steps=1))


def test_an_area_is_placed_in_the_whole_picture(model):
    positive, everywhere = tiny_models.prompt(1), tiny_models.prompt(5)
    (area,) = nodes.ConditioningSetArea().append(positive, 32, 32, 24, 16, 1.0)  # pixels: width, height, x, y
    found = levels(model, area + everywhere, select(positive))
    for (height, width), level in found.items():
        scale = 8 // height
        inside = torch.zeros(height, width, dtype=torch.bool)
        top, left = round(2 / scale), min(round(3 / scale), width - 4 // scale)
        inside[top : top + 4 // scale, left : left + 4 // scale] = True
        assert (level[..., inside] > 0).all()
        assert (level[..., ~inside] == 0).all()


def test_the_whole_grid_of_a_layer_is_known_from_a_crop():
    assert host.whole_grid(host.Area(12, 10, 0, 0, (25, 21)), (12, 10)) == (25, 21)
    assert host.whole_grid(host.Area(12, 10, 0, 0, (25, 21)), (6, 5)) == (13, 11)
    assert host.whole_grid(host.Area(13, 10, 0, 0, (25, 21)), (4, 3)) == (7, 6)
    assert host.whole_grid(host.Area(12, 12, 0, 0, (24, 36)), (8, 8)) == (16, 24)  # another node's downscaling


@pytest.mark.parametrize("size", [(9, 7), (8, 13)])
def test_odd_sizes_and_batches_keep_their_pictures_apart(model, size):
    positive, latent = tiny_models.prompt(1), tiny_models.latent(2, *size)
    found = levels(model, positive, latent=latent, steps=1)
    for i in range(2):
        noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))[i : i + 1]
        patched, kept = record(model, select(positive))
        sampling = comfy.samplers.KSampler(patched, 1, torch.device("cpu"), "euler", "normal")
        alone = sampling.sample(
            noise, positive, tiny_models.prompt(2), cfg=3.0, latent_image=latent["samples"][i : i + 1],
            disable_pbar=True, seed=1,
        )  # fmt: skip
        assert_same({grid: level[:, i : i + 1] for grid, level in found.items()}, kept.of(alone).levels)
    assert set(found) == {size, tuple(-(-side // 2) for side in size)}


def test_more_words_than_a_head_is_wide(model):
    positive = tiny_models.prompt(1, 30)
    many = select(positive, [f"w{i}" for i in range(20)], [(i,) for i in range(20)])
    few = select(positive, ["w17"], [(17,)])
    whole, one = (levels(model, positive, words, steps=1) for words in (many, few))
    assert_same({grid: level[:, :, 17:18] for grid, level in whole.items()}, one)


def test_samplers_that_call_twice_a_step_give_means(model):
    positive = tiny_models.prompt(1)
    for level in levels(model, positive, sampler="heun").values():
        assert torch.isfinite(level).all()
        assert level.min() > 0
        assert level.max() < 1


def test_only_the_asked_steps_and_layers_are_recorded(model):
    positive = tiny_models.prompt(1)
    patched, found = record(model, select(positive), start_percent=0.5, end_percent=1.0)
    run = found.of(sample(patched, positive, steps=4))
    for level in run.levels.values():
        recorded = ~level.flatten(1).isnan().any(1)
        assert recorded.tolist() == [False, False, True, True]
    read(found, run.samples)
    with pytest.raises(ValueError, match=r"nothing was recorded between 0 and 0.25 of the steps"):
        read(found, run.samples, end_percent=0.25)
    patched, found = record(model, select(positive), layers="middle")
    assert list(found.of(sample(patched, positive)).levels) == [(4, 4)]
    assert run.bytes == sum(level.numel() * 4 for level in run.levels.values())


def test_settings_that_record_nothing_are_refused(model):
    positive = tiny_models.prompt(1)
    with pytest.raises(ValueError, match=r"start_percent 0.5 and end_percent 0.5 leave no step"):
        record(model, select(positive), start_percent=0.5, end_percent=0.5)


def test_layers_whose_places_are_merged_are_refused(model):
    positive = tiny_models.prompt(1)
    patched, _ = record(model, select(positive))

    def merge(query, context, value, options):
        return query[:, ::2], context, value

    def unmerge(out, options):
        return out.repeat_interleave(2, 1)

    patched.set_model_attn2_patch(merge)
    patched.set_model_attn2_output_patch(unmerge)
    with pytest.raises(ValueError, match="cannot tell where a layer of 8 x 8 places looks: it asks for 32"):
        sample(patched, positive)


def test_every_input_of_the_recorder_arrives_where_it_acts(model, monkeypatch):
    chosen = {"layers": "decoder", "start_percent": 0.2, "end_percent": 0.7}
    assert {entry.id for entry in AttentionMap.define_schema().inputs} == {"model", "tokens", *chosen}
    attached, tokens = [], select(tiny_models.prompt(1))
    monkeypatch.setattr(recorder, "attach", lambda patched, layers, recorders: attached.append((layers, *recorders)))
    AttentionMap.execute(model, tokens, **chosen)
    ((layers, recorded),) = attached
    assert {layer.block for layer in layers} == {"output"}
    assert recorded.layers == {layer.key for layer in host.cross_attention_layers(model) if LAYERS["decoder"](layer)}
    assert (recorded.words, recorded.window) == (tokens, host.Window.of(model, 0.2, 0.7))


def test_every_input_of_the_search_arrives_in_its_field(monkeypatch):
    chosen = {"looks": 3, "start_percent": 0.2, "end_percent": 0.7}
    sockets = ("model", "trajectory", "tokens", "positive")
    assert {entry.id for entry in FindWords.define_schema().inputs} == {*chosen, *sockets}
    seen, steps = [], []
    monkeypatch.setattr(attention_map.latent_preview, "prepare_callback", lambda model, count: steps.append(count))
    monkeypatch.setattr(attention_map, "find_words", lambda *given: seen.append(given))
    trajectory = host.Trajectory(tuple(range(20, -1, -1)), torch.zeros(21, 1, 4, 2, 2), 1.0, "", "")
    FindWords.execute("model", trajectory, "tokens", "positive", **chosen)
    settings = finding.FindSettings(looks=3, start_percent=0.2, end_percent=0.7)
    assert seen == [("model", trajectory, "tokens", "positive", settings, None)]
    assert steps == [3]


# ---- whose record it is ---------------------------------------------------------------------------------------------


def test_every_picture_is_read_from_its_own_run(model):
    positive = tiny_models.prompt(1)
    patched, found = record(model, select(positive))
    first, second = sample(patched, positive, seed=1), sample(patched, positive, seed=2)
    alone = record(model, select(positive))
    assert_same(found.of(first).levels, alone[1].of(sample(alone[0], positive, seed=1)).levels)
    assert found.of(second) is not found.of(first)
    assert found.of(first.half()) is found.of(first)


def test_a_record_without_the_picture_says_what_to_do(model):
    positive = tiny_models.prompt(1)
    patched, found = record(model, select(positive))
    with pytest.raises(ValueError, match="samples is not connected"):
        read(found)
    with pytest.raises(ValueError, match="holds no run of a sampler yet: give the model of Attention Map"):
        read(found, torch.zeros(1, 4, 8, 8))
    samples = sample(patched, positive)
    with pytest.raises(ValueError, match="holds no run that gave these samples"):
        read(found, samples + 1)
    with pytest.raises(ValueError, match="samples is not connected"):  # also when the last prompt left a run behind
        read(found)


def test_words_that_were_never_sampled_are_told_of(model):
    positive, other = tiny_models.prompt(1), tiny_models.prompt(5)
    (averaged,) = nodes.ConditioningAverage().addWeighted(positive, other, 0.5)
    for prompt in (other, averaged):
        patched, found = record(model, select(positive))
        samples = sample(patched, prompt)
        with pytest.raises(ValueError, match="the words 'cat', 'red' were in no prompt that was sampled"):
            read(found, samples)


def test_an_interrupted_run_leaves_nothing(model):
    positive = tiny_models.prompt(1)
    patched, found = record(model, select(positive))

    def interrupt(args):
        raise comfy.model_management.InterruptProcessingException

    stopped = patched.clone()
    stopped.set_model_sampler_post_cfg_function(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(stopped, positive)
    assert found.runs == []
    assert not any(str(name).startswith(("palimpsest.", NAME)) for name in stopped.model_options["transformer_options"])


def test_a_record_forgets_old_runs(model):
    found = AttentionRecord(("cat",))
    runs = [RecordedRun(torch.full((1, 4, 2, 2), float(i)), {}) for i in range(KEPT_RUNS + 3)]
    for run in runs:
        found.add(run)
    assert found.runs == runs[3:]


# ---- words of a real picture ----------------------------------------------------------------------------------------


def invert(model, positive, steps=6, pictures=1):
    samples = tiny_models.latent(pictures)["samples"]
    schedule = inversion.descending_schedule(model, "normal", steps, None)
    return inversion.invert(model, samples, positive, levels=schedule)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_words_are_found_on_the_pictures_own_latents(family):
    model, positive = tiny_models.unet(family), tiny_models.prompt(1, family=family)
    trajectory = invert(model, positive)
    watched, seen = watch(model, select(positive))
    inputs = {"model": watched, "trajectory": trajectory, "tokens": select(positive), "positive": positive}
    (found,) = tiny_models.execute(FindWords, **inputs, looks=2, start_percent=0.5)
    assert_as_seen(found.runs[0].levels, seen, calls=2)
    levels = torch.tensor([trajectory.sigmas[3], 0.0])
    assert finding.spread(2, 6, 0.5, 1.0) == [3, 5]
    watched, again = watch(model, select(positive))
    visit = host.VisitLevels(trajectory.latents[3:4])
    host.sample(watched, visit, tiny_models.latent()["samples"], sigmas=levels, positive=positive)
    for grid, masses in again.items():
        torch.testing.assert_close(torch.cat(masses), torch.cat(seen[grid][: len(masses)]))
    *_, report = read(found)
    assert report.startswith("cat: ")


def test_a_batch_is_searched_picture_by_picture(model):
    positive = tiny_models.prompt(1)
    inputs = {"model": model, "tokens": select(positive), "positive": positive}
    both = tiny_models.execute(FindWords, **inputs, trajectory=invert(model, positive, pictures=2))[0].runs[0].levels
    assert all(level.shape[1] == 2 for level in both.values())
    assert all(torch.isfinite(level).all() for level in both.values())


def test_looks_are_spread_over_the_span():
    assert finding.spread(1, 20, 0.0, 1.0) == [10]
    assert finding.spread(20, 20, 0.0, 1.0) == list(range(20))
    assert finding.spread(50, 20, 0.0, 1.0) == list(range(20))
    assert finding.spread(5, 20, 0.5, 1.0) == [11, 13, 15, 17, 19]
    assert finding.spread(3, 1, 0.2, 0.7) == [0]
    assert finding.spread(3, 4, 0.0, 0.5) == [0, 1]
    assert finding.spread(3, 4, 0.99, 1.0) == [3]
    assert list(span(4, 1.0, 1.0)) == [3]


def test_find_words_refuses_what_it_cannot_search(model):
    positive = tiny_models.prompt(1)
    trajectory = invert(model, positive)
    inputs = {"model": model, "trajectory": trajectory, "tokens": select(positive), "positive": positive}
    with pytest.raises(ValueError, match="inverted with another model architecture"):
        tiny_models.execute(FindWords, **inputs | {"model": tiny_models.unet("sdxl")})
    with pytest.raises(ValueError, match="were in no prompt"):
        tiny_models.execute(FindWords, **inputs | {"positive": tiny_models.prompt(5)})
    with pytest.raises(ValueError, match=r"start_percent 0.7 and end_percent 0.7 leave no step"):
        tiny_models.execute(FindWords, **inputs, start_percent=0.7, end_percent=0.7)
