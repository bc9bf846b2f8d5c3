"""Models that are given a picture beside the latent: how many channels of their input, in what unit, in which rows."""

import comfy.sample
import comfy.sd
import pytest
import tiny_models
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from palimpsest.nodes import host

pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize(
    ("family", "prediction", "number", "scale"),
    [
        ("sd15", "EPS", 0, 1.0),
        ("sdxl", "EPS", 0, 1.0),
        ("sd15-inpaint", "EPS", 0, 1.0),
        ("sd15_edit", "EPS", 4, 1.0),
        ("sdxl_edit", "EPS", 4, 1.0),
        ("sdxl_edit", "V_PREDICTION_EDM", 4, 0.13025),
    ],
)
def test_channels_and_unit_are_the_hosts(family, prediction, number, scale):
    model = tiny_models.unet(family, prediction)
    found, latent = host.picture_channels(model), tiny_models.latent()["samples"]
    assert (found.number, bool(found)) == (number, number > 0)
    assert found.scale == pytest.approx(scale, rel=1e-6)
    if found:
        seen = model.model.concat_cond(concat_latent_image=latent, noise=latent, device=torch.device("cpu"))
        torch.testing.assert_close(seen, found.as_read(latent), rtol=1e-6, atol=0)


def test_the_pocket_model_with_picture_channels_draws_what_it_drew(pocket_checkpoint, pocket_edit, pocket_vae):
    drawn = []
    for file in (pocket_checkpoint, pocket_edit):
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False)
        assert host.picture_channels(model).number == 4 * (file == pocket_edit)
        texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red cat in the park", "")]
        picture = tiny_models.picture(1, 128, 128)
        positive, negative, latent = tiny_models.execute(
            InstructPixToPixConditioning, positive=texts[0], negative=texts[1], vae=pocket_vae, pixels=picture
        )
        noise = comfy.sample.prepare_noise(latent["samples"], 3)
        run = (8, 5.0, "ddim", "ddim_uniform", positive, negative, latent["samples"])
        drawn.append(comfy.sample.sample(model, noise, *run, disable_pbar=True, seed=3))
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
