"""What is said of a sampling run that does not go the way on which its picture was recorded, by the host's samplers."""

import re
import sys
from types import SimpleNamespace

import comfy.samplers
import harness
import pytest
import tiny_models
import torch
from palimpsest.nodes import host
from palimpsest.nodes.attention_fusion.nodes import AttentionFusion
from palimpsest.nodes.contextdiff.sampling import DDPM, ContextSampling, SamplerSettings
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.host import agreement
from palimpsest.nodes.kv.nodes import ApplyKV
from palimpsest.nodes.kv.settings import CONDITIONAL

pytestmark = pytest.mark.usefixtures("inference")

NOISY = {
    "euler_ancestral", "euler_ancestral_cfg_pp", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded():
    """(model, trajectory, inverted noise, kv) of a picture."""
    with torch.inference_mode():
        model = tiny_models.unet()
        trajectory, noise, *_ = harness.invert(model)
        return model, trajectory, noise, harness.tune(model, trajectory)[0]


def applied(model, kv, **settings):
    """(model with Apply KV, what it says of runs)."""
    output = ApplyKV.execute(model, kv, **{"source_guidance": 1.0} | settings)
    return output.args[0], output.ui["remarks"][0]


def blended(model, trajectory, **settings):
    """(model with Feature Blend, what it says of runs)."""
    prompt = harness.prompts()[0]
    output = FeatureBlend.execute(model, trajectory, prompt, mask=harness.half(), **settings)
    return output.args[0], output.ui["remarks"][0]


def texts(entries):
    return [entry["text"] for entry in entries]


# ---- what differs


def test_the_tunings_own_way_is_passed_in_silence(recorded):
    model, _, noise, kv = recorded
    patched, said = applied(model, kv)
    harness.sample(patched, noise)
    harness.sample(patched, noise, sampler="ddim")
    harness.sample(patched, noise, sampler="dpmpp_2m")
    assert said == []


DIFFERENT = {
    "steps": ({"steps": 8}, "tuned in 5 steps and is sampled in 8: each step takes what was learned at the nearest"),
    "scheduler": ({"scheduler": "karras"}, "tuned at other noise levels .* set the same scheduler"),
    "guidance": ({"cfg": 7.5}, "tuned at guidance 3 and is sampled at 7.5: set cfg to 3, or tune again at 7.5"),
    "ancestral": ({"sampler": "euler_ancestral"}, "sampler euler_ancestral adds fresh noise at every step.* set euler"),
    "sde": ({"sampler": "dpmpp_2m_sde"}, "sampler dpmpp_2m_sde adds fresh noise"),
    "added noise": ({"noise": harness.noise(seed=9)}, "noise is added to the picture's inverted noise.* add_noise to"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_run_that_differs_is_one_sentence_and_still_samples(recorded, name, caplog):
    (changes, wanted), (model, _, noise, kv) = DIFFERENT[name], recorded
    patched, said = applied(model, kv)
    with caplog.at_level("WARNING"):
        assert torch.isfinite(harness.sample(patched, noise, **changes)).all()
    (sentence,) = texts(said)
    assert re.search(wanted, sentence), sentence
    assert sentence in caplog.text


def test_another_start_is_said(recorded):
    model, _, noise, kv = recorded
    patched, said = applied(model, kv)
    harness.sample_noise(patched)
    harness.sample(patched, noise + harness.noise(seed=9))
    fresh, other = texts(said)
    assert "begins with fresh noise, not with the picture's inverted noise: connect noise of Invert Picture" in fresh
    assert "begins with another latent" in other


def test_several_differences_are_all_said(recorded):
    model, _, noise, kv = recorded
    patched, said = applied(model, kv)
    harness.sample(patched, noise, steps=8, cfg=1.0, sampler="lcm")
    assert len(said) == 3


# ---- what does not


def test_inverted_noise_beside_the_recorded_latent_adds_nothing(recorded):
    """As SamplerCustomAdvanced takes both: what is left of the one is rounding."""
    model, trajectory, noise, kv = recorded
    patched, said = applied(model, kv)
    left = host.FoundNoise(model, trajectory.latents[0], trajectory.sigmas[0]).generate_noise({"samples": noise})
    harness.sample(patched, noise, noise=left + 1e-6 * harness.noise(seed=9))
    assert said == []


def test_a_part_of_the_recorded_steps_is_right(recorded):
    model, _, noise, kv = recorded
    patched, said = applied(model, kv)
    first = harness.sample(patched, noise, start_step=0, last_step=2)
    harness.sample(patched, first, start_step=2, last_step=10000)
    harness.sample(patched, noise, start_step=0, last_step=3, force_full_denoise=True)
    assert said == []


def test_with_a_mask_other_noise_may_lie_beside_the_pictures(recorded):
    model, _, noise, kv = recorded
    patched, said = applied(model, kv, mask=harness.half(64, 128))
    harness.sample(patched, torch.cat([noise, harness.noise(seed=9)], 3))
    assert said == []


def test_a_tuning_by_the_prompt_only_has_no_guidance_to_compare(recorded):
    model, trajectory, noise, _ = recorded
    patched, said = applied(model, harness.tune(model, trajectory, tune_with=CONDITIONAL, inner_steps=1)[0])
    harness.sample(patched, noise, cfg=7.5)
    assert said == []


def test_guiders_of_several_guidances_are_not_compared(recorded):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model, _, noise, kv = recorded
    patched, said = applied(model, kv)
    guider, (positive, negative) = Guider_DualCFG(patched), harness.edits()
    guider.set_conds(positive, positive, negative)
    guider.set_cfg(5.0, 1.5)
    sigmas = torch.tensor(kv.sigmas)
    guider.sample(torch.zeros_like(noise), noise, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert said == []


def test_runs_of_our_own_nodes_are_not_edits(recorded):
    model, *_, kv = recorded
    patched, said = applied(model, kv)
    harness.invert(patched, steps=3)
    assert said == []


def test_at_strength_0_nothing_is_said(recorded):
    model, _, noise, kv = recorded
    patched, said = applied(model, kv, strength=0.0)
    harness.sample(patched, noise, steps=8)
    assert said == []


# ---- the other techniques


def test_feature_blend_takes_any_start_and_sampler_but_not_noise_on_inverted_noise(recorded):
    model, trajectory, noise, _ = recorded
    patched, said = blended(model, trajectory)
    harness.sample(patched, noise, cfg=7.0)
    assert said == []
    harness.sample_noise(patched, sampler="euler_ancestral")
    assert all("has left the source's path" in text for text in texts(said))
    harness.sample(patched, noise, steps=8)
    harness.sample(patched, noise, noise=harness.noise(seed=9))
    steps, added = (text for text in texts(said) if "has left the source's path" not in text)
    assert "inverted in 5 steps and is sampled in 8: between its noise levels the source is a straight line" in steps
    assert "noise is added to the picture's inverted noise" in added


def test_attention_fusion_needs_the_inversions_way():
    from attention_fusion.fusing import EDIT, SOURCE, encoder, inverted

    model, clip, _, trajectory, noise = inverted(encoder("sd15"))
    texts_of_both = {"source_text": SOURCE, "edit_text": EDIT, "layers": "all"}
    output = AttentionFusion.execute(model, trajectory, clip, **texts_of_both)
    patched, positive, said = output.args[0], output.args[1], output.ui["remarks"][0]
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    harness.sample(patched, noise, positive, negative, steps=trajectory.steps)
    assert said == []
    harness.sample(patched, noise, positive, negative, steps=trajectory.steps, sampler="euler_ancestral")
    harness.sample_noise(patched, noise, positive, negative, steps=trajectory.steps)
    noisy, start = texts(said)
    assert "sampler euler_ancestral adds fresh noise" in noisy
    assert "begins with fresh noise" in start


# ---- samplers


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_which_of_the_hosts_samplers_add_noise(name):
    assert agreement.adds_noise(comfy.samplers.sampler_object(name)) == (name in NOISY)


def test_options_and_our_own_sampler_count():
    def custom(name, **options):
        return agreement.adds_noise(comfy.samplers.ksampler(name, options))

    assert custom("euler", s_churn=1.0)
    assert not custom("euler_ancestral", eta=0.0)
    assert not custom("dpmpp_sde", s_noise=0.0)
    settings = {SamplerSettings(): False, SamplerSettings(eta=0.5): True, SamplerSettings(mode=DDPM): True}
    for chosen, wanted in settings.items():
        assert agreement.adds_noise(comfy.samplers.KSAMPLER(ContextSampling(None, chosen))) is wanted
    assert not agreement.adds_noise(object())


# ---- where it is said


def test_it_stands_under_the_node_until_a_run_agrees(recorded, monkeypatch):
    shown = []
    instance = SimpleNamespace(client_id="x", send_progress_text=lambda text, node, _: shown.append((node, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    model, _, noise, kv = recorded
    node = type("OfTheGraph", (ApplyKV,), {"hidden": SimpleNamespace(unique_id="7")})
    patched = node.execute(model, kv, source_guidance=1.0).args[0]
    for steps in (8, 5, 5):
        harness.sample(patched, noise, steps=steps)
    (_, usual), (_, warned), (_, again) = shown
    assert {name for name, _ in shown} == {"7"}
    assert usual == again == "sample from the picture's noise, add_noise disabled: 5 steps, cfg 3, euler"
    assert warned.startswith("the picture was tuned in 5 steps and is sampled in 8")


def test_a_nodes_history_of_remarks_stays_small():
    remarks = host.Remarks("7")
    for number in range(3 * agreement.KEPT):
        remarks.say([f"sentence {number}"])
    assert len(remarks.entries) == agreement.KEPT
    assert remarks.entries[-1]["text"] == f"sentence {3 * agreement.KEPT - 1}"


def test_the_history_of_each_prompt_has_what_is_said_of_its_run(client):
    """Also where the host takes Apply KV from its cache, and after the run of another prompt."""
    import argparse

    import demo
    import execution
    from pocket import world

    image = client.upload_image(demo.TESTS / "data" / "input" / "palimpsest_example.png")
    scene = world.held_out_scenes(139)[138]
    options = argparse.Namespace(
        family="unet", checkpoint=demo.POCKET, steps=3,
        guidance=3.0, inner_steps=1, layers="decoder", mode="extend", strength=1.0, source_guidance=1.0,
        start_percent=0.0, learning_rate=0.1,
    )  # fmt: skip
    edits = {"edit": demo.Edit("a red cat sitting in the snow")}
    nodes = demo.graph(image, world.caption(scene), edits, options)
    ends = {"SaveImage", "PreviewAny", "PalimpsestSaveKV"}
    nodes = {name: node for name, node in nodes.items() if node["class_type"] not in ends or name == "kv edit"}
    nodes["sample kv edit"]["inputs"] |= {"steps": 2, "noise_seed": 31}
    first = client.submit(nodes)
    entry = client.wait(first, timeout=300)
    nodes["sample kv edit"]["inputs"]["cfg"] = 5.0
    second = client.submit(nodes)
    again = client.wait(second, timeout=300)
    runs = [(first, entry, 1), (second, again, 2)]
    if not hasattr(execution, "_send_cached_ui"):
        runs.pop()  # older hosts leave what comes from their cache out of a prompt's history
    for prompt, found, count in runs:
        outputs = found["outputs"]["apply edit"]
        assert outputs["text"] == ["sample from the picture's noise, add_noise disabled: 3 steps, cfg 3, euler"]
        said = [one for one in outputs["remarks"][0] if one["prompt_id"] == prompt]
        assert len(said) == count
        assert {one["node_id"] for one in said} == {"sample kv edit"}
        assert "tuned in 3 steps and is sampled in 2" in said[0]["text"]
