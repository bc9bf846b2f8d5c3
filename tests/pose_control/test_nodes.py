"""A ControlNet or a T2I-Adapter on the edit, beside Apply KV: on the edit's own rows, every picture by its own hint."""

import logging

import comfy.controlnet
import harness
import pytest
import tiny_models
import torch

import nodes

MODES = ("extend", "recompute", "frozen")
STEPS = 3
WIDTH = tiny_models.SD15["model_channels"]

pytestmark = pytest.mark.usefixtures("inference")


class Features(torch.nn.Module):
    """A network of a T2I-Adapter's: the hint's colours, on the tokens of the first input block."""

    unshuffle_amount = 8

    def forward(self, hint):
        """{"input": features, the first block's last}."""
        colours = torch.nn.functional.avg_pool2d(hint, 8) / 1000
        return {"input": [None, colours.repeat(1, -(-WIDTH // 3), 1, 1)[:, :WIDTH]]}


def adapter():
    """A T2I-Adapter as the host's loader makes it."""
    return comfy.controlnet.T2IAdapter(Features(), 3, 8, "nearest-exact", torch.device("cpu"))


CONTROLS = {"controlnet": tiny_models.controlnet, "t2i adapter": adapter}


@pytest.fixture(scope="module")
def recorded():
    """(model, inverted noise, kv) of one picture, tuned in all layers."""
    with torch.inference_mode():
        model = tiny_models.unet()
        trajectory, noise, *_ = harness.invert(model, tiny_models.latent(), steps=STEPS)
        return model, noise, harness.tune(model, trajectory, layers="all")[0]


def shown(control, image, strength=1.0, start=0.0, end=1.0):
    """The edit's prompts with a control, by the host's own node."""
    positive, negative = harness.edits()
    chosen = {"control_net": control, "image": image, "strength": strength}
    window = {"start_percent": start, "end_percent": end}
    return tiny_models.execute(nodes.ControlNetApplyAdvanced, positive=positive, negative=negative, **chosen, **window)


def sample(model, noise, both):
    return harness.sample(model, noise, *both, steps=STEPS)


@pytest.mark.parametrize("kind", CONTROLS)
@pytest.mark.parametrize("mode", MODES)
def test_each_picture_of_a_batch_follows_its_own_hint(recorded, kind, mode, caplog):
    """Also in the row of source guidance, which the host is asked for by itself."""
    model, noise, kv = recorded
    edited, hints = harness.apply(model, kv, mode, source_guidance=4.0), 1e3 * tiny_models.picture(2, seed=4)
    alone = [sample(edited, noise, shown(CONTROLS[kind](), hints[i : i + 1])) for i in range(2)]
    harness.assert_acts(alone[0], alone[1])
    with caplog.at_level(logging.WARNING):
        together = sample(edited, noise.repeat(2, 1, 1, 1), shown(CONTROLS[kind](), hints))
    assert "control could not be applied" not in caplog.text
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONTROLS)
def test_source_guidance_insists_on_the_source_alone(recorded, kind):
    """Shown and hidden row have the control alike: where the source is not looked at, the scale is of no matter."""
    model, noise, kv = recorded
    both = shown(CONTROLS[kind](), tiny_models.picture(seed=4))
    nearly = [harness.apply(model, kv, strength=1e-6, source_guidance=scale) for scale in (1.0, 8.0)]
    found = [sample(each, noise, both) for each in nearly]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    harness.assert_acts(found[0], sample(model, noise, harness.edits()))


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_that_ends_leaves_the_rest_to_the_source(recorded, kind):
    model, noise, kv = recorded
    edited, hint = harness.apply(model, kv, source_guidance=4.0), 1e3 * tiny_models.picture(seed=4)
    never = sample(edited, noise, shown(CONTROLS[kind](), hint, end=0.0))
    assert torch.equal(never, sample(edited, noise, harness.edits()))
    half = sample(edited, noise, shown(CONTROLS[kind](), hint, end=0.5))
    harness.assert_acts(half, never)
    harness.assert_acts(half, sample(edited, noise, shown(CONTROLS[kind](), hint)))
