"""Tune KV and Apply KV in the host: reconstruction, identity, restoration, composition, refusals."""

import comfy.model_management
import comfy.samplers
import pytest
import tiny_models
import torch
from palimpsest.kernels.kv_inversion import attention
from palimpsest.nodes.host import model as host
from palimpsest.nodes.host.areas import Area
from palimpsest.nodes.inversion import ddim as inversion
from palimpsest.nodes.kv import auto as kv_auto
from palimpsest.nodes.kv import sampling as kv_sampling
from palimpsest.nodes.kv.embeddings import (
    LEARNED,
    SOURCE,
    KVEmbeddings,
    LayerEmbeddings,
    TunedLayer,
    nearest_level,
    pack,
)
from palimpsest.nodes.kv.nodes import AS_SET, CONDITIONAL, GUIDED, PAPER, WEIGHTS, ApplyKV, PromptLines, TuneKV
from palimpsest.nodes.kv.psi import Psi

STEPS, GUIDANCE = 4, 3.0


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def prompts(family="sd15", tokens=7):
    return tiny_models.prompt(1, family=family), tiny_models.prompt(2, tokens, family=family)


def record(model, latent, family="sd15"):
    """The trajectory of a latent."""
    positive, negative = prompts(family)
    levels = inversion.descending_schedule(model, "normal", STEPS, None)
    return inversion.invert(model, latent["samples"], positive, negative, levels, 1.0, inversion.NEXT_LEVEL)


def tune(model, trajectory, family="sd15", negative=None, **changes):
    """Run the node as the host would: (kv, reconstruction, report)."""
    settings = {
        "preset": AS_SET, "guidance": GUIDANCE, "tune_cfg": GUIDED, "placement": "decoder", "start": 0.0,
        "inner_steps": 4, "learning_rate": 0.05, "tolerance": 0.0, "warm_start": True, "keep_source": True,
    } | changes  # fmt: skip
    positive, usual = prompts(family)
    kv, rebuilt, report = TuneKV.execute(model, trajectory, positive, negative=negative or usual, **settings).args
    return kv, rebuilt["samples"], report


def sample(
    model, noise, guidance=GUIDANCE, family="sd15", steps=STEPS, negative=None, sampler="euler", scheduler="normal"
):
    """The host's own sampler from inverted noise."""
    positive, usual = prompts(family)
    sampler = comfy.samplers.KSampler(model, steps, torch.device("cpu"), sampler, scheduler)
    return sampler.sample(
        torch.zeros_like(noise), positive, negative or usual, guidance, latent_image=noise, disable_pbar=True, seed=1
    )


def start(model, trajectory):
    return model.model.process_latent_out(trajectory.latents[0].clone())


def apply(model, kv, mode="recompute", strength=1.0, first=0.0, last=1.0, layers="all", mask=None, guidance=1.0):
    return ApplyKV.execute(model, kv, AS_SET, mode, strength, guidance, first, last, layers, 0.0, mask).args[0]


@pytest.fixture(scope="module")
def tuned():
    """(model, latent, trajectory, kv, reconstruction) of one tuning that several tests look at."""
    with torch.inference_mode():
        model, latent = tiny_models.unet(), tiny_models.latent()
        trajectory = record(model, latent)
        return model, latent, trajectory, *tune(model, trajectory)[:2]


# ---- tuning


@pytest.mark.parametrize(
    ("family", "prediction", "zsnr"), [("sd15", "EPS", False), ("sd15", "V_PREDICTION", True), ("sdxl", "EPS", False)]
)
def test_tuning_rebuilds_the_picture_better_than_ddim(family, prediction, zsnr):
    model, latent = tiny_models.unet(family, prediction, zsnr), tiny_models.latent()
    trajectory = record(model, latent, family)
    plain = sample(model, start(model, trajectory), family=family)
    _, rebuilt, report = tune(model, trajectory, family, inner_steps=16, learning_rate=0.1)
    wanted = latent["samples"]
    assert (rebuilt - wanted).norm() < 0.7 * (plain - wanted).norm()
    assert "rebuilt at guidance 3" in report


def test_the_stock_sampler_with_the_embeddings_rebuilds_it_too(tuned):
    model, _, trajectory, kv, rebuilt = tuned
    again = sample(apply(model, kv), start(model, trajectory))
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)  # the embeddings are stored in half precision


def test_the_model_is_left_as_it_was(tuned):
    model = tiny_models.unet()
    latent = tiny_models.latent()
    trajectory = record(model, latent)
    weights = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.model.named_parameters()}
    before = sample(model, start(model, trajectory))
    tune(model, trajectory)
    assert torch.equal(sample(model, start(model, trajectory)), before)
    for name, p in model.model.named_parameters():
        assert p.data_ptr() == weights[name][0]
        assert torch.equal(p, weights[name][1])
        assert p.requires_grad == weights[name][2]
        assert p.grad is None
    assert not any(getattr(m, "weight_function", []) for m in model.model.modules())
    assert not model.model_options["transformer_options"].get("patches_replace")


def test_cancelling_leaves_the_model_as_it_was(monkeypatch):
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory = record(model, latent)
    before, calls = sample(model, start(model, trajectory)), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tune(model, trajectory)
    monkeypatch.undo()
    assert torch.equal(sample(model, start(model, trajectory)), before)
    assert torch.is_inference_mode_enabled()


def test_pictures_of_a_batch_are_tuned_each_on_their_own():
    model, batch = tiny_models.unet(), tiny_models.latent(2)
    trajectory = record(model, batch)
    kv, rebuilt, _ = tune(model, trajectory)
    assert kv.pictures == 2
    for i in range(2):
        alone = tune(model, record(model, {"samples": batch["samples"][i : i + 1]}))[1]
        torch.testing.assert_close(rebuilt[i : i + 1], alone, rtol=1e-2, atol=1e-2)
    again = sample(apply(model, kv), start(model, trajectory))
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)


def test_early_steps_and_other_blocks_are_left_alone():
    model = tiny_models.unet()
    kv = tune(model, record(model, tiny_models.latent()), start=0.5, placement="middle")[0]
    assert [step is None for step in kv.learned] == [True, True, False, False]
    assert {layer.block for layer in kv.layers} == {"middle"}
    assert kv.scalars.shape == (STEPS, 1, 4, 1)


def test_no_iterations_are_plain_ddim():
    model = tiny_models.unet()
    trajectory = record(model, tiny_models.latent())
    kv, rebuilt, _ = tune(model, trajectory, inner_steps=0)
    torch.testing.assert_close(rebuilt, sample(model, start(model, trajectory)), rtol=1e-4, atol=1e-4)
    assert kv.info["iterations"] == 0


def test_prompt_only_tuning_rebuilds_at_guidance_1():
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory = record(model, latent)
    plain = sample(model, start(model, trajectory), guidance=1.0)
    kv, rebuilt, _ = tune(model, trajectory, tune_cfg=CONDITIONAL, inner_steps=8)
    assert (rebuilt - latent["samples"]).norm() < (plain - latent["samples"]).norm()
    assert kv.info["guidance"] == 1.0


def test_a_high_tolerance_stops_at_once():
    model = tiny_models.unet()
    kv = tune(model, record(model, tiny_models.latent()), tolerance=1.0)[0]
    assert kv.info["iterations"] == 0


def test_weights_in_bfloat16():
    model = tiny_models.unet(dtype=torch.bfloat16)
    latent = tiny_models.latent()
    trajectory = record(model, latent)
    plain = sample(model, start(model, trajectory))
    _, rebuilt, _ = tune(model, trajectory, inner_steps=8)
    assert (rebuilt - latent["samples"]).norm() < (plain - latent["samples"]).norm()


def test_prompts_of_different_lengths():
    model, latent = tiny_models.unet(), tiny_models.latent()
    long = tiny_models.prompt(2, tokens=40)  # 7 and 40 tokens cannot be joined: cond and uncond run apart
    trajectory = record(model, latent)
    plain = sample(model, start(model, trajectory), negative=long)
    kv, rebuilt, _ = tune(model, trajectory, negative=long, inner_steps=8)
    assert (rebuilt - latent["samples"]).norm() < (plain - latent["samples"]).norm()
    again = sample(apply(model, kv), start(model, trajectory), negative=long)
    torch.testing.assert_close(again, rebuilt, rtol=2e-2, atol=2e-2)


def test_tuning_refuses_what_it_cannot_do(tuned):
    _, _, trajectory, *_ = tuned
    with pytest.raises(ValueError, match="another model architecture"):
        tune(tiny_models.unet("sdxl"), trajectory, "sdxl")
    with pytest.raises(ValueError, match=r"start 0\.95 and end 1 leave none of 4 steps"):
        tune(tiny_models.unet(), trajectory, start=0.95)
    nan = [[torch.full((1, 7, 24), float("nan")), {}]]
    with pytest.raises(ValueError, match="NaN at step 1"):
        tune(tiny_models.unet(), trajectory, negative=nan)
    limited = [[tiny_models.prompt(1)[0][0], {"area": (4, 4, 0, 0), "strength": 1.0}]]
    with pytest.raises(ValueError, match="limited to an area"):
        tune(tiny_models.unet(), trajectory, negative=limited)
    with pytest.raises(ValueError, match="needs the negative prompt"):
        TuneKV.execute(
            tiny_models.unet(),
            trajectory,
            tiny_models.prompt(),
            AS_SET,
            5.0,
            GUIDED,
            "decoder",
            0.0,
            1,
            0.1,
            0.0,
            True,
            True,
        )


def test_the_papers_preset_replaces_the_values(tuned):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, preset=PAPER, placement="middle", inner_steps=0)[0]
    assert {layer.block for layer in kv.layers} == {"output"}
    assert kv.info["inner_steps"] == 10
    assert kv.info["guidance"] == 1.0
    noise = start(model, trajectory)
    by_name = ApplyKV.execute(model, kv, PAPER, "frozen", 0.3, 4.0, 0.9, 0.95, "middle", 0.5).args[0]
    assert torch.equal(sample(by_name, noise), sample(apply(model, kv, first=0.4), noise))


# ---- sampling


def test_strength_0_is_the_model_itself(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    assert torch.equal(sample(apply(model, kv, strength=0.0), noise), sample(model, noise))


def test_untrained_embeddings_change_no_bit(tuned):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, inner_steps=0)[0]
    noise = start(model, trajectory)
    assert torch.equal(sample(apply(model, kv), noise), sample(model, noise))


@pytest.mark.parametrize("mode", list(kv_sampling.MODES))
def test_the_unpatched_model_is_untouched_by_its_patched_clone(tuned, mode):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    before = sample(model, noise)
    edited = sample(apply(model, kv, mode), noise)
    assert not torch.equal(edited, before)
    assert torch.equal(sample(model, noise), before)
    assert torch.equal(sample(apply(model, kv, mode), noise), edited)


def test_looking_ahead_shows_the_source_of_a_later_step(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    assert [kv.ahead(i, 0.5) for i in range(STEPS)] == [2, 3, 3, 3]

    def edit(mode, look_ahead):
        patched = kv_sampling.apply(model, kv, mode, 1.0, 0.0, 1.0, "all", None, look_ahead)
        return sample(patched, noise)

    assert not torch.equal(edit("extend", 0.5), edit("extend", 0.0))
    assert torch.equal(edit("recompute", 0.5), edit("recompute", 0.0))  # has no use for the source


def test_source_guidance_pushes_away_from_the_picture_without_the_source(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    positive, negative = prompts()

    def one_step(patched, guidance):
        levels = torch.tensor([trajectory.sigmas[0], 0.0])
        return inversion.sample(patched, inversion.descend, noise, levels, positive, negative, guidance)

    for guidance in (GUIDANCE, 1.0):  # at guidance 1 the host runs without the negative prompt
        only = (negative, negative) if guidance != 1.0 else (positive, positive)
        levels = torch.tensor([trajectory.sigmas[0], 0.0])
        shown, hidden = (
            inversion.sample(m, inversion.descend, noise, levels, *only, 1.0)
            for m in (apply(model, kv, "recompute"), model)
        )
        wanted = one_step(apply(model, kv, "recompute"), guidance) + 3.0 * (shown - hidden)
        found = one_step(apply(model, kv, "recompute", guidance=4.0), guidance)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_any_sampler_schedule_and_step_count(tuned, sampler):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    out = sample(apply(model, kv), noise, steps=7, sampler=sampler, scheduler="karras")
    assert torch.isfinite(out).all()


def test_the_window_of_steps(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    plain = sample(model, noise)
    assert torch.equal(sample(apply(model, kv, first=1.0, last=1.0), noise), plain)
    assert not torch.equal(sample(apply(model, kv, first=0.5), noise), plain)
    assert torch.equal(sample(apply(model, kv, layers="encoder"), noise), plain)  # tuned in the decoder only


def test_a_black_mask_is_the_model_itself_and_a_white_one_the_whole_edit(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    assert torch.equal(sample(apply(model, kv, mask=torch.zeros(1, 37, 91)), noise), sample(model, noise))
    white = sample(apply(model, kv, mask=torch.ones(64, 64)), noise)
    torch.testing.assert_close(white, sample(apply(model, kv), noise), rtol=1e-4, atol=1e-4)


def test_embeddings_of_one_picture_serve_a_batch(tuned):
    model, _, trajectory, kv, _ = tuned
    noise = start(model, trajectory)
    three = sample(apply(model, kv), noise.repeat(3, 1, 1, 1))
    torch.testing.assert_close(three[2:], sample(apply(model, kv), noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["extend", "recompute"])
@pytest.mark.parametrize("guided", [True, False])
def test_two_applications_chain(tuned, guided, mode):
    model, _, trajectory, kv, _ = tuned
    noise, guidance = start(model, trajectory), GUIDANCE if guided else 1.0
    once = sample(apply(model, kv, mode), noise, guidance)
    twice = sample(apply(apply(model, kv, mode), kv, mode), noise, guidance)
    assert not torch.equal(once, twice)


def test_another_nodes_replacement_still_acts(tuned):
    model, _, trajectory, kv, _ = tuned
    layer, seen = kv.layers[0], []

    def theirs(query, key, value, options):
        seen.append(key.shape)
        return torch.zeros_like(query)

    other = model.clone()
    other.set_model_attn1_replace(theirs, layer.block, layer.number)
    sample(apply(other, kv), start(model, trajectory))
    assert len(seen) == STEPS


def test_wrong_sizes_and_batches_are_refused_with_a_way_out(tuned):
    model, _, trajectory, kv, _ = tuned
    with pytest.raises(ValueError, match=r"latent of 8 x 8, sampling runs at 8 x 12.*resize"):
        sample(apply(model, kv), torch.randn(1, 4, 12, 8))
    two = tune(model, record(model, tiny_models.latent(2)))[0]
    with pytest.raises(ValueError, match="tuned to 2 pictures, the sampled batch has 3"):
        sample(apply(model, two), torch.randn(3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"another architecture.*does not have|has with"):
        apply(tiny_models.unet("sdxl"), kv)
    with pytest.raises(ValueError, match="swap them"):
        apply(model, kv, first=0.9, last=0.1)
    with pytest.raises(ValueError, match="NaN"):
        apply(model, kv, mask=torch.full((1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="keep_source on"):
        apply(model, tune(model, trajectory, keep_source=False)[0], "frozen")


# ---- the adapter alone, against the equations

LAYER = TunedLayer("output", 3, 0, 4, 6, 16)


def options(rows, chunks, step):
    """What the host hands an attention replacement."""
    return {
        "cond_or_uncond": list(range(chunks))[::-1], "n_heads": 2, "dim_head": 8, "attn_precision": None,
        "activations_shape": [rows, 16, 4, 6], "kv": step, "block": LAYER.key[:2], "block_index": LAYER.index,
    }  # fmt: skip


@pytest.mark.parametrize("mode", list(kv_sampling.MODES))
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("shared", [True, False], ids=["one picture for all", "one for each"])
def test_the_adapter_is_equation_1_and_2(mode, strength, shared):
    q, k, v = torch.randn(3, 4, 24, 16)
    pictures = 1 if shared else 2
    learned = LayerEmbeddings(
        *torch.randn(2, pictures, 24, 16), *torch.rand(4, pictures, 1, 1), None, *torch.randn(2, pictures, 24, 16)
    )
    out = attend(mode, learned, strength)(q, k, v)
    rows = {name: t.repeat(4 // pictures, 1, 1) for name, t in vars(learned).items() if t is not None}
    if mode == "recompute":
        k_bar = rows["lambda_k"] * k + rows["gamma_k"] * rows["k_hat"]
        v_bar = rows["lambda_v"] * v + rows["gamma_v"] * rows["v_hat"]
    elif mode == "frozen":
        k_bar = rows["lambda_k"] * rows["k_source"] + rows["gamma_k"] * rows["k_hat"]
        v_bar = rows["lambda_v"] * rows["v_source"] + rows["gamma_v"] * rows["v_hat"]
    else:
        k_bar, v_bar = rows["k_source"], rows["v_source"]
    if mode == "extend":
        wanted = weighted(q, torch.cat([k, k_bar], 1), torch.cat([v, v_bar], 1), [1.0] * 24 + [strength] * 24)
    else:
        wanted = attention(q, torch.lerp(k, k_bar, strength), torch.lerp(v, v_bar, strength), 2)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def attend(mode, learned, strength=1.0, mask=None, source_mask=None):
    """A layer's attention with one source, as the host calls it."""
    mode = kv_sampling.MODES[mode]
    source = kv_sampling.Source("kv", {LAYER.key: LAYER}, mode, strength, mask)
    step = kv_sampling.CurrentStep({LAYER.key: mode(learned, source_mask)})
    attention = kv_sampling.SourceAttention((source,))
    return lambda q, k, v: attention(q, k, v, options(len(q), 2, step))


def weighted(q, k, v, weights):
    """Attention in which key j counts weights[j] times."""
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT / 8**0.5).exp() * torch.as_tensor(weights)
    return ((scores / scores.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("different", [False, True], ids=["one mask", "a mask for each"])
def test_a_source_mask_restricts_the_keys(different):
    q, k, v = torch.randn(3, 4, 24, 16)
    learned = LayerEmbeddings(*torch.randn(2, 2, 24, 16), *torch.rand(4, 2, 1, 1), None, *torch.randn(2, 2, 24, 16))
    seen = (torch.rand(2, 24) > 0.5).float()
    seen = seen if different else seen[:1]
    rows = {name: t.repeat(2, 1, 1) for name, t in vars(learned).items() if t is not None}
    found = attend("extend", learned, source_mask=seen)(q, k, v)
    keys, values = torch.cat([k, rows["k_source"]], 1), torch.cat([v, rows["v_source"]], 1)
    for row in range(4):
        weights = torch.cat([torch.ones(24), seen[row % len(seen)]])
        wanted = weighted(q[row : row + 1], keys[row : row + 1], values[row : row + 1], weights)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-5)
    m = seen.expand(2, -1).repeat(2, 1)[..., None]
    k_bar = k + m * (rows["lambda_k"] * k + rows["gamma_k"] * rows["k_hat"] - k)
    v_bar = v + m * (rows["lambda_v"] * v + rows["gamma_v"] * rows["v_hat"] - v)
    found = attend("recompute", learned, source_mask=seen)(q, k, v)
    torch.testing.assert_close(found, attention(q, k_bar, v_bar, 2), rtol=1e-4, atol=1e-5)


def test_a_mask_with_no_white_token_leaves_the_whitest():
    shown = kv_sampling.visible(torch.arange(3.0)[None, :, None], torch.zeros(1, 3, 1), torch.tensor([[0.1, 0.3, 0.2]]))
    assert shown.key.flatten().tolist() == [1.0]


def test_a_prompts_area_takes_its_part_of_the_learned_tokens():
    area = Area(2, 4, 1, 2, (4, 6))
    assert area.tokens((LAYER.height, LAYER.width), 2, 4).tolist() == [8, 9, 10, 11, 14, 15, 16, 17]
    assert area.tokens((2, 3), 1, 2).tolist() == [1, 2]  # 1 / 4 of 2 rows rounds down to row 0
    assert area.crop(torch.arange(96.0).view(1, 8, 12))[0, 0].tolist() == [28.0, 29, 30, 31, 32, 33, 34, 35]


def test_rows_that_other_nodes_add_are_refused():
    with pytest.raises(ValueError, match="5 rows for 2 prompts"):
        host.chunk_rows({"cond_or_uncond": [1, 0]}, 5)


def test_the_nearest_level_is_nearest_by_ratio():
    assert [nearest_level((14.6, 1.0, 0.03), s) for s in (900.0, 3.0, 5.0, 0.5, 0.1, 0.0)] == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_step_is_read_back_as_it_was_written(rank):
    layers = [LAYER, TunedLayer("middle", 0, 1, 2, 3, 8)]
    psi = Psi(layers, 2, torch.device("cpu"), rank)
    for t in psi.tensors():
        t.copy_(torch.randn_like(t))
    sources = {layer.key: torch.randn(2, layer.tokens, layer.channels) for layer in layers}
    kv = KVEmbeddings(
        (1.0, 0.0), tuple(layers), (0, 1), (pack(psi.factors.values()),),
        (pack([(t,)] for t in sources.values()),),
        torch.stack([s[..., 0, 0].T for s in psi.scalars.values()])[None], torch.zeros(2, 4, 4, 6), "x", rank,
    )  # fmt: skip
    read = kv.step(0, kv.pieces(0, [LEARNED, SOURCE]), torch.device("cpu"), torch.float32)
    for layer in layers:
        found = read[layer.key]
        for hat, written in zip((found.k_hat, found.v_hat), psi.embeddings(layer.key), strict=True):
            torch.testing.assert_close(hat, written, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.source, sources[layer.key], rtol=1e-3, atol=1e-3)
        weights = torch.stack([found.lambda_k, found.gamma_k, found.lambda_v, found.gamma_v], 1)
        torch.testing.assert_close(weights, psi.weights(layer.key))
    assert LAYER.factored(rank) == (rank in (2, 5))
    assert layers[1].factored(rank) == (rank == 2)


def test_steps_between_keyframes_lie_between_them():
    pieces = [None, torch.zeros(1, 2 * 24 * 16).half(), None, None, torch.ones(1, 2 * 24 * 16).half()]
    scalars = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 4, 1)
    kv = KVEmbeddings(
        (5.0, 4, 3, 2, 1, 0), (LAYER,), (1, 5), tuple(pieces), (None,) * 5, scalars, torch.zeros(1, 4, 4, 6), "x"
    )
    assert [kv.keyframes(i) for i in range(5)] == [None, (1, 1, 0.0), (1, 4, 1 / 3), (1, 4, 2 / 3), (4, 4, 0.0)]
    assert kv.step(0, kv.pieces(0, [LEARNED]), torch.device("cpu"), torch.float32) is None
    layer = kv.step(3, kv.pieces(3, [LEARNED, SOURCE]), torch.device("cpu"), torch.float32)[LAYER.key]
    torch.testing.assert_close(layer.k_hat, torch.full((1, 24, 16), 2 / 3))
    torch.testing.assert_close(layer.lambda_k, torch.full((1, 1, 1), 3.0))
    assert layer.source is None


# ---- ways to tune


def errors(model, trajectory, latent, **changes):
    """(error of the reconstruction, error when the stock sampler uses the embeddings, kv)."""
    kv, rebuilt, _ = tune(model, trajectory, inner_steps=12, learning_rate=0.1, **changes)
    assert bool((kv.scalars[:, :, 1::2] == 1.0).all()) == ("keyframes" not in changes and "learn" not in changes)
    again = sample(apply(model, kv), start(model, trajectory))
    return *((x - latent["samples"]).norm().item() for x in (rebuilt, again)), kv


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4}, {"keyframes": 2}, {"keyframes": 3, "rank": 4}, {"batch_steps": 2}, {"batch_steps": 3, "rank": 4},
        {"learn": WEIGHTS}, {"end": 0.75}, {"start": 0.25, "end": 0.75}, {"keep_source": False},
        {"keep_source": False, "batch_steps": 4, "warm_start": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_of_tuning_rebuilds_better_than_ddim(tuned, changes):
    model, latent, trajectory, *_ = tuned
    plain = (sample(model, start(model, trajectory)) - latent["samples"]).norm().item()
    rebuilt, again, kv = errors(model, trajectory, latent, **changes)
    assert rebuilt < plain * (1.0 if changes.get("learn") == WEIGHTS else 0.97)  # four weights a layer do little
    assert again == pytest.approx(rebuilt, rel=0.05)
    assert kv.keeps_source == changes.get("keep_source", True)


def test_ranks_and_keyframes_are_smaller(tuned):
    model, _, trajectory, full, _ = tuned
    sizes = {}
    for changes in ({"rank": 2}, {"keyframes": 3}, {"learn": WEIGHTS}):
        kv = tune(model, trajectory, inner_steps=1, **changes)[0]
        sizes[str(changes)] = kv.bytes / full.bytes
    assert list(sizes.values()) == pytest.approx([0.22, 0.5, 0.333], abs=0.06)


def test_only_weights_can_be_learned(tuned):
    model, _, trajectory, *_ = tuned
    kv = tune(model, trajectory, learn=WEIGHTS)[0]
    assert kv.weights_only
    layer = kv.step(0, kv.pieces(0, [LEARNED]), torch.device("cpu"), torch.float32)[kv.layers[0].key]
    layer = layer.projected(torch.nn.Identity(), torch.neg)
    assert torch.equal(layer.k_hat, layer.source)
    assert torch.equal(layer.v_hat, -layer.source)
    assert abs(float(layer.gamma_k)) > 0


def test_a_tuning_mask_learns_only_what_is_white():
    model, latent = tiny_models.unet(), tiny_models.latent()
    trajectory = record(model, latent)
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    kv, rebuilt, _ = tune(model, trajectory, mask=mask, inner_steps=12, learning_rate=0.1)
    plain = sample(model, start(model, trajectory))
    gain = (plain - latent["samples"]).abs() - (rebuilt - latent["samples"]).abs()
    assert gain[..., :4].mean() > 2 * gain[..., 4:].mean()
    layer = max(kv.layers, key=lambda layer: layer.tokens)
    found = kv.step(0, kv.pieces(0, [LEARNED]), torch.device("cpu"), torch.float32)[layer.key]
    grid = found.k_hat.unflatten(1, (layer.height, layer.width))
    assert grid[:, :, layer.width // 2 :].abs().max() == 0
    assert grid[:, :, : layer.width // 2].abs().max() > 0
    with pytest.raises(ValueError, match="mask of Tune KV is black"):
        tune(model, trajectory, mask=torch.zeros(1, 8, 8))


def test_auto_chooses_a_placement_and_says_so(tuned):
    model, _, trajectory, *_ = tuned
    kv, _, report = tune(model, trajectory, auto=True, placement="middle", inner_steps=2)
    assert kv.info["placement"] in kv_auto.PLACEMENTS
    assert f"auto took {kv.info['placement']} from {kv.info['start']:g}" in report
    assert report.count("layout") == len(kv_auto.PLACEMENTS) * len(kv_auto.STARTS)


# ---- many prompts


def test_lines_become_prompts():
    assert PromptLines.execute("sitting \n\n# not this\nlying", "a cat {} here").args[0] == [
        "a cat sitting here", "a cat lying here",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has no"):
        PromptLines.execute("sitting", "a cat")
    with pytest.raises(ValueError, match="no prompt"):
        PromptLines.execute("\n # \n", "{}")
