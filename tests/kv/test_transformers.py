"""Keys and values on transformers, recorded and learned: what is bit-equal, what acts where, and what is refused."""

import comfy.model_management
import comfy.samplers
import pytest
import tiny_models
import tiny_transformers
import torch
from comfy_extras import nodes_custom_sampler
from harness import assert_acts, assert_close
from palimpsest.nodes import host
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.host import gradient, reference
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv import fitting, tuning
from palimpsest.nodes.kv.embeddings import TunedLayer
from palimpsest.nodes.kv.fitting import FitTrajectory
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.kv.psi import Psi
from palimpsest.nodes.kv.settings import TuneSettings
from palimpsest.nodes.kv.tuned_attention import TuningState
from palimpsest.nodes.words import ChosenWords
from tiny_transformers import APART, EVERY, FAMILIES, latent, own_run, prompt, sample

import nodes

STEPS = 3
EVERYWHERE = {"start_percent": 0.0, "source_guidance": 1.0, "layers": "all"}

pytestmark = pytest.mark.usefixtures("inference")


def tune(model, trajectory, family, tokens=9, **settings):
    given = {"positive": prompt(family, 1, tokens), "inner_steps": 0, "layers": "all"} | settings
    return tiny_models.execute(TuneKV, model=model, trajectory=trajectory, **given)


def apply(model, kv, **settings):
    return tiny_models.execute(ApplyKV, model=model, kv=kv, **EVERYWHERE | settings)[0]


def drawn(model, family, seed=1, pictures=1, text=1, tokens=9, **settings):
    given = {"steps": STEPS, "cfg": 1.0, "seed": seed} | settings
    return sample(model, prompt(family, text, tokens), prompt(family, 2), latent(family, pictures), **given)


def left(model, family):
    """A MASK in pixels, white on the left half."""
    height, width = (side * 8 for side in EVERY[family].side)
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("family", [*FAMILIES, *APART])
def test_the_same_run_is_bit_equal_and_another_prompt_is_changed(models, family):
    model = models(family)
    trajectory, plain = own_run(model, family)
    kv, clean, report = tune(model, trajectory, family)
    assert clean["samples"].shape == plain.shape
    assert_close(clean["samples"], plain)
    assert "levels" in report
    assert kv.family in report
    assert torch.equal(drawn(apply(model, kv, mode="frozen"), family), plain)
    edit = drawn(model, family, text=3)
    for mode in ("extend", "frozen"):
        assert_acts(drawn(apply(model, kv, mode=mode), family, text=3), edit)
    assert torch.equal(drawn(model, family), plain)


@pytest.mark.parametrize("family", [*FAMILIES, *APART])
def test_what_does_nothing_is_bit_equal(models, family):
    """Strength 0 and a mask that is black, guided, with prompts of two lengths."""
    model = models(family)
    kv = tune(model, own_run(model, family)[0], family)[0]
    black = torch.zeros(1, 32, 32)
    plain = drawn(model, family, text=3, cfg=3.0, tokens=12)
    for settings in ({"strength": 0.0}, {"mask": black}, {"mask": black, "mode": "frozen"}):
        assert torch.equal(drawn(apply(model, kv, **settings), family, text=3, cfg=3.0, tokens=12), plain), settings
    assert_acts(drawn(apply(model, kv), family, text=3, cfg=3.0, tokens=12), plain)


@pytest.mark.parametrize("family", ["flux", "qwen", "zimage", "sd3", "wan"])
def test_beside_every_step_is_as_recorded(models, family, monkeypatch):
    """Where memory is too small the source has a pass of its own at each step, on the same latents."""
    model = models(family)
    trajectory, plain = own_run(model, family)
    recorded = tune(model, trajectory, family)[0]
    monkeypatch.setattr(reference, "free_memory", lambda: 0)
    beside, _, report = tune(model, trajectory, family)
    assert "one more row" in report
    assert torch.equal(drawn(apply(model, beside, mode="frozen"), family), plain)
    found = (drawn(apply(model, kv), family, text=3, cfg=3.0) for kv in (recorded, beside))
    assert_close(*found)


def joint(queries, keys, values, weights):
    """softmax(q k / sqrt(d) + log w) v, written out; weights (N, M)."""
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5 + weights.log()
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen", "wan", "anima"])
def test_extend_is_attention_to_both_pictures_written_out(models, family):
    """The last layer's attention, of its own q, k, v and of those of the source's run; both masks and strength."""
    model = models(family)
    trajectory, _ = own_run(model, family)
    white = left(model, family)
    kv = tune(model, trajectory, family)[0]
    side = [-(-cells // (1 if family == "flux2" else 2)) for cells in EVERY[family].side]
    half = (torch.arange(side[1]) < side[1] // 2).float().repeat(side[0])
    seen = []

    def last(function, q, k, v, heads, mask=None, skip_reshape=False, **named):
        out = function(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **named)
        if named["transformer_options"].get("palimpsest_test"):
            seen.append((q, k, v, mask, out))
        return out

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = last
    watched.model_options["transformer_options"]["palimpsest_test"] = True
    patched = apply(watched, kv, strength=0.5, mask=white, source_mask=white)
    drawn(patched, family, text=3, steps=STEPS)
    assert seen, "the override of another node is still asked"
    q, k, v, _, out = next(each for each in seen if each[1].shape[-2] > each[0].shape[-2])
    tokens, image = q.shape[-2], len(half)
    added = k.shape[-2] - tokens
    assert added == int(half.sum())
    weights = torch.ones(tokens, tokens + added)
    weights[:, tokens:] = 0.5
    wanted = joint(q, k, v, weights).transpose(1, 2).flatten(2)
    assert_close(out, wanted, 1e-5)
    assert tokens == image if family in APART else image + 9 <= tokens


def test_a_mask_keeps_the_source_inside(models):
    """What is outside changes less: it looks at what is inside, never at the source."""
    model, family = models("flux"), "flux"
    kv = tune(model, own_run(model, family)[0], family)[0]
    mask = left(model, family)
    plain = drawn(model, family, text=3, steps=1)
    found = drawn(apply(model, kv, mask=mask), family, text=3, steps=1)
    inside = (found - plain)[..., : mask.shape[-1] // 16].norm()
    outside = (found - plain)[..., mask.shape[-1] // 16 :].norm()
    assert inside > 2 * outside


@pytest.mark.parametrize("family", ["flux", "zimage", "wan"])
def test_words_and_another_nodes_override_act_beside_it(models, family):
    model = models(family)
    kv = tune(model, own_run(model, family)[0], family)[0]
    positive, calls = prompt(family, 3, 9), []

    def theirs(function, *args, **named):
        calls.append(1)
        return function(*args, **named)

    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = theirs
    words = ChosenWords(("word",), ((3, 4),), positive[0][0])
    given = {"mask": left(model, family), "tokens": words, "mask_negative": False}
    both = {}
    for order in ("words first", "source first"):
        patched = apply(other, kv) if order == "source first" else other
        patched = tiny_models.execute(CrossAttentionMask, model=patched, **given)[0]
        patched = apply(patched, kv) if order == "words first" else patched
        both[order] = sample(patched, positive, prompt(family, 2), latent(family), steps=STEPS, cfg=3.0, seed=1)
    assert calls
    assert torch.equal(*both.values())
    alone = sample(apply(model, kv), positive, prompt(family, 2), latent(family), steps=STEPS, cfg=3.0, seed=1)
    assert_acts(both["source first"], alone)


def test_two_sources_and_guidance_by_one(models):
    model, family = models("zimage"), "zimage"
    one = tune(model, own_run(model, family)[0], family)[0]
    two = tune(model, own_run(model, family, seed=7)[0], family)[0]
    mask = left(model, family)
    alone = drawn(apply(model, one, mask=mask), family, text=3)
    both = drawn(apply(apply(model, one, mask=mask), two, mask=1 - mask), family, text=3)
    assert_acts(both, alone)
    guided = drawn(apply(model, one, source_guidance=3.0), family, text=3, cfg=3.0)
    assert_acts(guided, drawn(apply(model, one), family, text=3, cfg=3.0))
    assert torch.isfinite(guided).all()


@pytest.mark.parametrize("family", ["zimage", "wan", "anima"])
def test_a_picture_inverted_by_uni_inv_lends_its_keys_and_values(models, family):
    """Through Invert Picture and SamplerCustomAdvanced, as the nodes are wired."""
    model = models(family)
    picture = torch.randn(latent(family).shape, generator=torch.Generator().manual_seed(3))
    given = {"positive": prompt(family, 1), "steps": 4, "scheduler": "simple"}
    trajectory, noise, rebuilt, _, found = tiny_models.execute(
        Invert, model=model, latent={"samples": picture}, **given
    )
    kv, clean, report = tune(model, trajectory, family)
    assert_close(clean["samples"], picture)
    assert "the prompt differs" not in report
    assert "levels" in report

    def edited(patched, text):
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(prompt(family, text), prompt(family, 2))
        guider.set_cfg(1.0)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(trajectory.sigmas)
        run = nodes_custom_sampler.SamplerCustomAdvanced.execute(found, guider, sampler, sigmas, noise)
        return run.args[0]["samples"]

    assert_close(edited(model, 1), rebuilt["samples"])
    plain = edited(model, 3)
    for mode in ("extend", "frozen"):
        assert_acts(edited(apply(model, kv, mode=mode), 3), plain)
    # at the settings that the nodes have by themselves
    default = tiny_models.execute(ApplyKV, model=model, kv=kv)[0]
    assert_acts(edited(default, 3), plain)


def test_layers_spans_and_batches(models):
    model, family = models("flux"), "flux"
    trajectory, _ = own_run(model, family)
    everything = tune(model, trajectory, family)[0]
    decoder = tune(model, trajectory, family, layers="decoder", keyframes=2, start_percent=0.3)[0]
    assert decoder.layers == (("single", 1, 0),)
    assert len(decoder.levels) < len(everything.levels) == STEPS
    assert torch.equal(
        drawn(apply(model, everything, layers="decoder"), family, text=3),
        drawn(apply(model, tune(model, trajectory, family, layers="decoder")[0]), family, text=3),
    )
    assert_acts(drawn(apply(model, decoder), family, text=3), drawn(model, family, text=3))
    two = drawn(apply(model, everything), family, text=3, pictures=2)
    assert two.shape[0] == 2
    masks = torch.cat([left(model, family), 1 - left(model, family)])
    batch = tune(model, own_run(model, family, pictures=2)[0], family)[0]
    assert torch.isfinite(drawn(apply(model, batch, source_mask=masks), family, text=3, pictures=2)).all()


def test_what_is_refused(models):
    model, family = models("flux"), "flux"
    trajectory, _ = own_run(model, family)
    kv = tune(model, trajectory, family)[0]
    with pytest.raises(ValueError, match="auto_layers compares the blocks of U-Nets"):
        tune(model, trajectory, family, auto_layers=True)
    with pytest.raises(ValueError, match="rank is for what is learned, and inner_steps is 0"):
        tune(model, trajectory, family, rank=8)
    with pytest.raises(ValueError, match=r"load the FLUX\.1 model that was inverted"):
        apply(models("zimage"), kv)
    with pytest.raises(ValueError, match="invert the picture with this model"):
        tune(models("zimage"), trajectory, "zimage")
    with pytest.raises(ValueError, match="take mode extend or frozen"):
        apply(model, kv, mode="recompute")
    with pytest.raises(ValueError, match=r"look_ahead is 0\.2"):
        apply(model, kv, look_ahead=0.2)
    larger = latent(family, side=(16, 8))
    with pytest.raises(ValueError, match="the trajectory was recorded for a latent of 8 x 12"):
        sample(apply(model, kv), prompt(family, 3), prompt(family, 2), larger, steps=1)


def test_a_video_looks_at_a_recorded_picture_beside_its_own_frames_and_takes_it_for_none_of_them(models):
    model, family = models("wan"), "wan"
    kv = tune(model, own_run(model, family)[0], family)[0]

    def video(patched):
        return sample(patched, prompt(family, 3), prompt(family, 2), latent(family, frames=2), steps=1)

    assert_acts(video(apply(model, kv, mode="extend")), video(model))
    with pytest.raises(ValueError, match="puts 24 recorded tokens in the place of 48"):
        video(apply(model, kv, mode="frozen"))


# ---- what is learned ------------------------------------------------------------------------------------------------

LEARNING = list(EVERY)
GUIDANCE = 3.0
LEARN = {"inner_steps": 12, "guidance": GUIDANCE, "learning_rate": 0.05, "rank": 4, "tolerance": 0.0}


def learned(model, trajectory, family, **settings):
    """(kv, reconstruction, report) of a tuning at a guidance that the trajectory was not drawn at."""
    return tune(model, trajectory, family, **LEARN | {"negative": prompt(family, 2)} | settings)


def error(samples, wanted):
    return float((samples - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", LEARNING)
def test_a_tuning_rebuilds_the_picture_at_the_guidance_of_the_edit(models, family):
    """Half of what guidance does to the picture is mended at least; mode recompute then draws it again."""
    model = models(family)
    trajectory, plain = own_run(model, family)
    guided = drawn(model, family, cfg=GUIDANCE)
    kv, rebuilt, report = learned(model, trajectory, family)
    assert error(rebuilt["samples"], plain) < 0.5 * error(guided, plain)
    assert "rebuilt at guidance 3" in report
    assert ("tune at guidance 1, or record" in report) is (family == "flux")
    again = drawn(apply(model, kv, mode="recompute"), family, cfg=GUIDANCE)
    assert_close(again, rebuilt["samples"], 2e-3)  # kept in half precision
    assert_acts(drawn(apply(model, kv, mode="recompute"), family, text=3, cfg=GUIDANCE),
                drawn(model, family, text=3, cfg=GUIDANCE))  # fmt: skip
    assert torch.equal(drawn(apply(model, kv, mode="frozen"), family), plain)  # the record stands beside it
    assert torch.equal(drawn(model, family, cfg=GUIDANCE), guided)
    assert not comfy.model_management.in_training


@pytest.mark.parametrize("family", LEARNING)
def test_the_gradient_is_the_slope(models, family):
    """Along a direction of K_hat and V_hat of all layers the loss rises as its gradient says: blocks that write over
    their inputs, and those that run again for the gradient, are no other function."""
    model = models(family)
    trajectory, _ = own_run(model, family)
    slopes = {}

    class Probe(FitTrajectory):
        def fit(self, psi, rows, iterations):
            self.state.psi = psi
            generator = torch.Generator().manual_seed(4)
            tensors, _ = psi.learnable()
            with torch.no_grad():
                for tensor in tensors:
                    tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
            ways = [torch.randn(tensor.shape, generator=generator) for tensor in tensors]

            def loss(step):
                for tensor, way in zip(tensors, ways, strict=True):
                    tensor.data.add_(way, alpha=step)
                return self.advance(rows)[0].double().pow(2).sum()

            with torch.no_grad():
                low, high = loss(-1e-2), loss(2e-2)
            with torch.enable_grad():
                for tensor in tensors:
                    tensor.requires_grad_(True)
                loss(-1e-2).backward()
            for tensor in tensors:
                tensor.requires_grad_(False)
            by_gradient = sum(float((tensor.grad * way).sum()) for tensor, way in zip(tensors, ways, strict=True))
            slopes[rows.step] = float(high - low) / 2e-2, by_gradient
            return self.walk(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "FitTrajectory", Probe)
        learned(model, trajectory, family, rank=0)
    assert len(slopes) == STEPS
    for measured, by_gradient in slopes.values():
        assert by_gradient == pytest.approx(measured, rel=0.02, abs=0.02), slopes


@pytest.mark.parametrize("family", ["flux", "qwen", "sd3", "zimage", "wan", "anima"])
def test_what_has_learned_nothing_changes_nothing(models, family):
    """lambda = gamma = 1 and K_hat = V_hat = 0, guided, prompts of two lengths: bit-equal in the same attention."""
    model = models(family)
    chosen = TuneSettings(layers="all", rank=4)
    layers = tuning.joint_layers(model, host.family_of(model), own_run(model, family)[0], chosen)
    state = TuningState()
    patched, _ = tuning.with_tuned_joint(model, host.family_of(model), layers, state, False)
    given = {"text": 3, "cfg": GUIDANCE, "tokens": 12}
    plain = drawn(patched, family, **given)
    assert_close(plain, drawn(model, family, **given), 1e-5)  # torch's attention in place of the host's own
    grids = [TunedLayer(*layer.key, *state.grids[layer.key], layer.channels) for layer in layers]
    state.psi = Psi(grids, 1, torch.device("cpu"), rank=4)
    assert torch.equal(drawn(patched, family, **given), plain)


def test_the_pictures_tokens_get_what_equation_1_says(models):
    """K_bar = lambda K + gamma K_hat of the picture's tokens in every row, while learning and while editing."""
    model, family = models("flux"), "flux"
    trajectory, _ = own_run(model, family)
    kv = learned(model, trajectory, family, rank=0)[0]
    seen = []

    def last(function, q, k, v, heads, mask=None, skip_reshape=False, **named):
        seen.append((k.clone(), v.clone()))
        return function(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **named)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = last
    drawn(watched, family, steps=1)
    plain = seen[0]
    seen.clear()
    drawn(apply(watched, kv, mode="recompute", strength=0.5), family, steps=1)
    step = kv.learned.step(0, kv.learned.pieces(0, ("learned",)), torch.device("cpu"), torch.float32)[("double", 0, 0)]
    image = slice(9, 9 + 24)
    for own, found, hat, weight in zip(
        plain, seen[0], (step.k_hat, step.v_hat), (step.lambda_k, step.lambda_v), strict=True
    ):
        flat = own[:, :, image].transpose(1, 2).flatten(2)
        bar = (weight * flat + hat).unflatten(2, (own.shape[1], -1)).transpose(1, 2)
        assert_close(found[:, :, image], 0.5 * own[:, :, image] + 0.5 * bar, 1e-5)
        assert torch.equal(found[:, :, :9], own[:, :, :9])


def test_masks_batches_groups_of_steps_and_layers_of_what_is_learned(models):
    model, family = models("qwen"), "qwen"
    trajectory, plain = own_run(model, family, pictures=2)
    white = left(model, family)
    whole, rebuilt, _ = learned(model, trajectory, family)
    assert whole.pictures == 2
    assert error(rebuilt["samples"], plain) < error(drawn(model, family, pictures=2, cfg=GUIDANCE), plain)
    for settings in ({"batch_steps": 2}, {"keyframes": 2}, {"layers": "decoder"}, {"start_percent": 0.4},
                     {"tune_with": "prompt only", "guidance": 7.5}, {"warm_start": False}):  # fmt: skip
        kv, found, _ = learned(model, trajectory, family, **settings)
        assert torch.isfinite(found["samples"]).all(), settings
        again = drawn(apply(model, kv, mode="recompute"), family, pictures=2,
                      cfg=1.0 if "tune_with" in settings else GUIDANCE)  # fmt: skip
        assert_close(again, found["samples"], 2e-3)
    masked = learned(model, trajectory, family, mask=white)[0]
    step = masked.learned.step(0, masked.learned.pieces(0, ("learned",)), torch.device("cpu"), torch.float32)
    half = (torch.arange(4) < 2).repeat(6)
    for layer in step.values():
        assert layer.k_hat[:, ~half].abs().max() == 0
        assert layer.k_hat[:, half].abs().max() > 0
    black = drawn(apply(model, whole, mode="recompute", mask=torch.zeros(1, 32, 32)), family, pictures=2, cfg=GUIDANCE)
    assert torch.equal(black, drawn(model, family, pictures=2, cfg=GUIDANCE))
    for name in ("mask", "source_mask"):
        part = drawn(apply(model, whole, mode="recompute", **{name: white}), family, pictures=2, cfg=GUIDANCE)
        assert_acts(part, black)
        assert_acts(part, drawn(apply(model, whole, mode="recompute"), family, pictures=2, cfg=GUIDANCE))


@pytest.mark.parametrize("layers", ["all", "decoder"])
def test_a_controlnet_acts_while_keys_and_values_are_learned(models, layers):
    """It takes the run off its path, and what is learned leads it back; the host's own sampler then does the same."""
    model, family = models("flux"), "flux"
    trajectory, plain = own_run(model, family)
    given = {"control_net": tiny_transformers.controlnet(), "image": tiny_models.picture(1, 96, 64, seed=4)}
    given |= {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0}
    both = {"positive": prompt(family, 1), "negative": prompt(family, 2)}
    positive, negative = tiny_models.execute(nodes.ControlNetApplyAdvanced, **both, **given)
    controlled = sample(model, positive, negative, latent(family), steps=STEPS, cfg=GUIDANCE)
    assert_acts(controlled, drawn(model, family, cfg=GUIDANCE))
    learned_with = LEARN | {"positive": positive, "negative": negative, "layers": layers}
    kv, rebuilt, _ = tune(model, trajectory, family, **learned_with)
    assert error(rebuilt["samples"], plain) < 0.7 * error(controlled, plain)
    patched = apply(model, kv, mode="recompute")
    again = sample(patched, positive, negative, latent(family), steps=STEPS, cfg=GUIDANCE)
    assert_close(again, rebuilt["samples"], 2e-3)
    assert torch.equal(sample(model, positive, negative, latent(family), steps=STEPS, cfg=GUIDANCE), controlled)


def test_another_guidance_than_the_tunings_is_told(models, caplog):
    model, family = models("qwen"), "qwen"
    kv = learned(model, own_run(model, family)[0], family, inner_steps=1)[0]
    for mode, told in (("recompute", True), ("extend", False)):
        caplog.clear()
        drawn(apply(model, kv, mode=mode), family, cfg=5.0)
        assert ("tuned at guidance 3 and is sampled at 5: set cfg to 3" in caplog.text) is told


def test_what_a_tuning_refuses_and_leaves_behind(models, monkeypatch):
    model, family = models("qwen"), "qwen"
    trajectory, _ = own_run(model, family)
    with pytest.raises(ValueError, match="learn is 'weights only', which is for U-Nets"):
        learned(model, trajectory, family, learn="weights only")
    with pytest.raises(ValueError, match="the mask of Tune KV is black all over"):
        learned(model, trajectory, family, mask=torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match="negative"):
        learned(model, trajectory, family, negative=None)
    with pytest.raises(ValueError, match="layers is 'encoder', and this model has no layers there"):
        learned(model, trajectory, family, layers="encoder")
    with monkeypatch.context() as small:
        small.setattr(comfy.model_management, "get_total_memory", lambda device: 1e5)
        with pytest.raises(
            ValueError, match=r"take 0\.0 GB at rank 0, .* set rank to 32 \(0\.0 GB\), or inner_steps to 0"
        ):
            learned(model, trajectory, family, rank=0)
    kv = learned(model, trajectory, family, keep_source=False)[0]
    assert kv.source is None
    edit = drawn(apply(model, kv, mode="recompute"), family, cfg=GUIDANCE)
    assert_acts(drawn(apply(model, kv, mode="extend"), family, cfg=GUIDANCE), edit)  # recorded by Apply KV
    larger = latent(family, side=(16, 8))
    with pytest.raises(ValueError, match="the trajectory was recorded for a latent of 8 x 12"):
        sample(apply(model, kv, mode="recompute"), prompt(family, 3), prompt(family, 2), larger, steps=1)

    def stop():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(fitting.host, "stop_if_cancelled", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        learned(model, trajectory, family)
    assert not comfy.model_management.in_training


@pytest.mark.parametrize("family", LEARNING)
def test_blocks_before_the_first_that_learns_run_once_a_step_and_change_nothing(models, family, monkeypatch):
    """Bit-equal to running them, and so where another node looks into them, which leaves them running."""
    model = models(family)
    trajectory, _ = own_run(model, family)
    network, ran = model.model.diffusion_model, []
    first = host.block_names(host.family_of(model), host.thirds(model, host.family_of(model))["all"][:1])[0]
    inside = next(part for part in network.get_submodule(first).modules() if isinstance(part, torch.nn.Linear))
    counted = inside.register_forward_pre_hook(lambda *_: ran.append(1))
    settings = {"layers": "decoder", "keep_source": False, "inner_steps": 3}
    found = {}
    for name in ("cached", "watched", "not cached"):
        watched = model.clone()
        if name == "watched":
            watched.set_model_patch(lambda args: args, "double_block")
        if name == "not cached":
            monkeypatch.setattr(gradient.CachedBlocks, "install", lambda *_: None)
        ran.clear()
        kv, rebuilt, _ = learned(watched, trajectory, family, **settings)
        found[name] = rebuilt["samples"], kv.learned.learned, len(ran)
    counted.remove()
    for name in ("watched", "not cached"):
        assert torch.equal(found[name][0], found["cached"][0])
        assert all(torch.equal(*pair) for pair in zip(found[name][1], found["cached"][1], strict=True))
        assert found[name][2] > 2 * found["cached"][2]
