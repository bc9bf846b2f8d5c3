"""What the tests of Attention Fusion share: text encoders for the small models, and how an edit is sampled."""

import comfy.sd
import harness
import pytest
import tiny_models
import torch
from comfy import sd1_clip, sdxl_clip
from palimpsest.nodes import host
from palimpsest.nodes.attention_fusion.nodes import AttentionFusion
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.video.nodes import VideoAttention

CACHED, SAME_STEP = "cached", "same step"
STEPS, GUIDANCE = 4, 3.0
acts = harness.acts

SOURCE, EDIT = "a brown dog in the park", "a very red dog in the park"

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}

CLIPS = {
    "sd15": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
    "sdxl": (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer),
}


families = pytest.mark.parametrize("family", ["sd15", "sdxl"])

sources = pytest.mark.parametrize("source_features", [CACHED, SAME_STEP])


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


def fuse(model, clip, trajectory, **settings):
    """(patched model, positive, report) at the node's defaults except `settings`."""
    texts = {"source_text": SOURCE, "edit_text": EDIT}
    return tiny_models.execute(AttentionFusion, model=model, clip=clip, trajectory=trajectory, **texts | settings)


def video(model, **settings):
    return tiny_models.execute(VideoAttention, model=model, **settings)[0]


def empty(clip):
    return clip.encode_from_tokens_scheduled(clip.tokenize(""))


def sample(model, noise, positive, negative, cfg=GUIDANCE, sampler="euler", steps=STEPS):
    return harness.sample(model, noise, positive, negative, cfg=cfg, sampler=sampler, steps=steps)


def acting(patched):
    """The wrapper by which the last Attention Fusion acts on a model."""
    return list(patched.wrappers["predict_noise"].values())[-1][0]


def source_of(patched):
    """Where its features of the source come from."""
    return acting(patched).source


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


def encoder(family):
    """A text encoder for one family of the small models."""
    model, tokenizer = CLIPS[family]
    options = {f"clip_{name}_model_config": SMALL for name in "lg"}
    with torch.inference_mode():
        return WideClip(comfy.sd.CLIP(Target(model, tokenizer), model_options=options))


def inverted(clip, family="sd15", pictures=1, height=8, width=8):
    """(model, clip, latent, trajectory, inverted noise) of some pictures."""
    model, latent = tiny_models.unet(family), tiny_models.latent(pictures, height, width)
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(SOURCE))
    trajectory, noise, *_ = tiny_models.execute(
        Invert, model=model, latent=latent, positive=prompt, steps=STEPS, reconstruction_guidance=0.0
    )
    return model, clip, latent["samples"], trajectory, noise["samples"]
