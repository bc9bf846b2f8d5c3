"""Building the pocket checkpoint: widening, 8-bit weights, layout, no-op, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pocket import checkpoint, text_encoder
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def shipped():
    return checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)


# ---------------------------------------------------------------------------------------------------------- widen


def attend(state: dict, x: torch.Tensor, text: torch.Tensor, heads: int = 2) -> torch.Tensor:
    """LayerNorm, cross-attention and a GEGLU feed-forward over x (B, N, C), as a transformer block has them."""
    normed = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"])
    q, k, v = normed @ state["attn2.to_q.weight"].T, *(text @ state[f"attn2.to_{n}.weight"].T for n in "kv")
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ state["attn2.to_out.0.weight"].T
    value, gate = (x @ state["ff.net.0.proj.weight"].T + state["ff.net.0.proj.bias"]).chunk(2, -1)
    return x + (value * F.gelu(gate)) @ state["ff.net.2.weight"].T


def test_widened_layers_compute_the_same():
    torch.manual_seed(0)
    c, context = 8, 6
    shapes = {
        "input_blocks.0.0.weight": (c, 4, 3, 3),
        "norm.weight": (c,),
        "norm.bias": (c,),
        "attn2.to_q.weight": (c, c),
        "attn2.to_k.weight": (c, context),
        "attn2.to_v.weight": (c, context),
        "attn2.to_out.0.weight": (c, c),
        "ff.net.0.proj.weight": (8 * c, c),
        "ff.net.0.proj.bias": (8 * c,),
        "ff.net.2.weight": (c, 4 * c),
        "group.weight": (c,),
        "out.2.weight": (4, c, 3, 3),
        "out.2.bias": (4,),
    }
    narrow = {name: torch.randn(shape) for name, shape in shapes.items()}
    latent, text = torch.randn(2, 4, 5, 7), torch.randn(2, 3, context)

    def run(state: dict) -> torch.Tensor:
        x = F.group_norm(F.conv2d(latent, state["input_blocks.0.0.weight"], padding=1), 4, state["group.weight"])
        x = attend(state, x.flatten(2).transpose(1, 2), text).transpose(1, 2).unflatten(2, latent.shape[2:])
        return F.conv2d(x, state["out.2.weight"], state["out.2.bias"], padding=1)

    wide = checkpoint.widen(narrow)
    assert wide["norm.weight"].shape == (2 * c,)
    expected = run(narrow)
    assert torch.allclose(run(wide), expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("layer", ["attn1_to_q", "attn1_to_out_0", "attn2_to_q", "attn2_to_k", "attn2_to_v"])
def test_a_widened_lora_changes_the_widened_weight_as_the_narrow_one_the_narrow(layer):
    torch.manual_seed(0)
    name = f"lora_unet_input_blocks_1_1_transformer_blocks_0_{layer}"
    up, down = torch.randn(8, 3), torch.randn(3, 6)
    wide = checkpoint.widen_lora({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    weight = layer.replace("_to_", ".to_").replace("out_0", "out.0") + ".weight"
    wanted = checkpoint.widen({weight: up @ down})[weight]
    torch.testing.assert_close(wide[f"{name}.lora_up.weight"] @ wide[f"{name}.lora_down.weight"], wanted)
    again = checkpoint.narrow_lora(wide)
    torch.testing.assert_close(again, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})


def test_the_shipped_lora_fits_the_checkpoint(shipped):
    wide = checkpoint.widen(shipped[0])
    shapes = {"lora_unet_" + name.replace(".", "_").removesuffix("_weight"): t.shape for name, t in wide.items()}
    folder = Path(checkpoint.__file__).parent / "models" / "loras"
    for name, tensor in load_file(folder / "palimpsest_pocket_unet.safetensors").items():
        layer, _, kind = name.partition(".")
        if kind.startswith("lora_up"):
            assert len(tensor) == shapes[layer][0], name
        elif kind.startswith("lora_down"):
            assert tensor.shape[1] == shapes[layer][1], name


def test_widened_shapes_are_those_of_sd15(shipped):
    wide = {name: tuple(value.shape) for name, value in checkpoint.widen(shipped[0]).items()}
    block = "input_blocks.1.1.transformer_blocks.0."
    assert wide["input_blocks.0.0.weight"] == (320, 4, 3, 3)
    assert wide["time_embed.0.weight"] == (1280, 320)
    assert wide["time_embed.2.weight"] == (1280, 1280)
    assert wide[block + "attn2.to_k.weight"] == (320, 768)
    assert wide[block + "attn1.to_q.weight"] == (320, 320)
    assert wide[block + "ff.net.0.proj.weight"] == (2560, 320)
    assert wide["out.2.weight"] == (4, 320, 3, 3)
    assert wide["out.2.bias"] == (4,)


# ---------------------------------------------------------------------------------------------------------- 8 bits


def test_packed_weights_are_off_by_at_most_half_a_level():
    torch.manual_seed(0)
    state = {"weight": torch.randn(5, 7, 3, 3).half(), "zero": torch.zeros(4, 4).half(), "bias": torch.randn(5).half()}
    packed = checkpoint.pack(state)
    assert packed["weight.int8"].dtype == torch.int8
    back = checkpoint.unpack(packed)
    assert back.keys() == state.keys()
    assert torch.equal(back["bias"], state["bias"])
    assert torch.equal(back["zero"], state["zero"])
    level = state["weight"].float().flatten(1).abs().amax(1) / 127
    error = (back["weight"].float() - state["weight"].float()).flatten(1).abs().amax(1)
    assert (error <= 0.5 * level * 1.1 + 1e-3).all()  # 1.1 and 1e-3: scale and result are float16


def test_packed_model_is_half_as_large_and_close(shipped):
    state, _ = shipped
    packed = checkpoint.pack(state)
    size, full = (sum(v.nbytes for v in s.values()) for s in (packed, state))
    assert size < 0.51 * full
    back = checkpoint.unpack(packed)
    error = sum((back[n].float() - v.float()).square().sum() for n, v in state.items())
    assert (error / sum(v.float().square().sum() for v in state.values())).sqrt() < 0.01


def test_plain_weights_pass_through_unpack():
    state = {"a.scale": torch.ones(2), "b.weight": torch.ones(2, 2)}
    assert checkpoint.unpack(state).keys() == state.keys()


# ---------------------------------------------------------------------------------------------------- text encoder


def test_text_encoder_has_clip_l_shapes_and_idle_layers():
    state = text_encoder.state_dict()
    assert state["embeddings.token_embedding.weight"].shape == (49408, 768)
    assert state["embeddings.position_embedding.weight"].shape == (77, 768)
    assert state["encoder.layers.11.mlp.fc1.weight"].shape == (3072, 768)
    assert len(state) == 2 + 2 + 12 * 16
    assert state["encoder.layers.0.self_attn.out_proj.weight"].abs().max() > 0
    assert all(state[f"encoder.layers.{i}.self_attn.out_proj.weight"].abs().max() == 0 for i in range(1, 12))


def test_text_encoder_draws_the_same_numbers_everywhere():
    first = text_encoder.state_dict()["embeddings.token_embedding.weight"][0, :4].float()
    assert torch.allclose(first, torch.tensor(text_encoder.FIRST_VALUES), atol=1e-3)
    table = text_encoder.state_dict()["embeddings.token_embedding.weight"]
    assert torch.equal(table[1, :-1], table[0, 1:])  # Toeplitz


def test_encoder_equals_the_host(comfy_host_path):
    from comfy import sd1_clip

    encoder = text_encoder.Encoder(tokenizer=comfy_host_path / "comfy" / "sd1_tokenizer")
    ids = sd1_clip.SD1Tokenizer().tokenize_with_weights("a red cat sitting on the left")["l"][0]
    assert encoder.token_ids("a red cat sitting on the left") == [token for token, _ in ids]
    assert encoder(["a red cat", ""]).shape == (2, 77, 768)


# ------------------------------------------------------------------------------------------------------ checkpoint


@pytest.fixture
def small_weights(tmp_path, monkeypatch):
    """A folder of tiny weights, and a text encoder of one number."""
    monkeypatch.setattr(text_encoder, "checkpoint_state_dict", lambda: {"cond_stage_model.x": torch.ones(1)})
    folder = tmp_path / "weights"
    folder.mkdir()
    settings = {"latent_mean": "0.5", "latent_std": "2.0"}
    save_file({"middle.weight": torch.randn(2, 2).half()}, folder / checkpoint.UNET, settings)
    save_file({"taesd_encoder.0.weight": torch.randn(2, 3, 3, 3).half()}, folder / checkpoint.AUTOENCODER)
    checkpoint.write_sums(folder)
    return folder


def test_build_writes_once_and_again_when_the_weights_change(small_weights, tmp_path):
    out = tmp_path / "models" / "pocket.safetensors"
    assert checkpoint.build(out, small_weights)
    first = out.stat().st_mtime_ns
    assert not checkpoint.build(out, small_weights)
    assert out.stat().st_mtime_ns == first
    settings = {"latent_mean": "0", "latent_std": "1"}
    save_file({"middle.weight": torch.zeros(2, 2).half()}, small_weights / checkpoint.UNET, settings)
    checkpoint.write_sums(small_weights)
    assert checkpoint.build(out, small_weights)
    assert list(out.parent.iterdir()) == [out]  # no temporary file is left


def test_checkpoint_keys_and_latent_scale(small_weights, tmp_path):
    out = tmp_path / "pocket.safetensors"
    checkpoint.build(out, small_weights)
    state, metadata = checkpoint.load_weights(out)
    assert state["model.diffusion_model.middle.weight"].shape == (4, 4)
    assert state["first_stage_model.taesd_encoder.0.weight"].shape == (2, 3, 3, 3)
    assert json.loads(metadata[checkpoint.RECIPE_KEY])["text_encoder_seed"] == text_encoder.SEED
    scale, shift = (state[f"first_stage_model.vae_{n}"].item() for n in ("scale", "shift"))
    z = 3.0  # of the encoder; the host's latent must be (z - mean) / std
    assert 0.18215 * (z / scale + shift) == pytest.approx((z - 0.5) / 2.0, abs=1e-5)


def test_a_broken_file_is_built_again(small_weights, tmp_path):
    out = tmp_path / "pocket.safetensors"
    out.write_bytes(b"cut short")
    assert checkpoint.build(out, small_weights)


def test_errors_say_what_to_do(small_weights, tmp_path, monkeypatch):
    out = tmp_path / "pocket.safetensors"
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3})())
    with pytest.raises(checkpoint.PocketError, match="free some space"):
        checkpoint.build(out, small_weights)
    unet = small_weights / checkpoint.UNET
    unet.write_bytes(unet.read_bytes()[:-1])
    with pytest.raises(checkpoint.PocketError, match="does not match SHA256SUMS"):
        checkpoint.build(out, small_weights)
    unet.unlink()
    with pytest.raises(checkpoint.PocketError, match=r"unet\.safetensors is missing"):
        checkpoint.build(out, small_weights)
    (small_weights / checkpoint.SUMS).unlink()
    with pytest.raises(checkpoint.PocketError, match="SHA256SUMS is missing"):
        checkpoint.build(out, small_weights)
    assert not out.exists()


def test_weights_without_their_settings_are_refused(small_weights, tmp_path):
    save_file({"middle.weight": torch.zeros(2, 2).half()}, small_weights / checkpoint.UNET)
    checkpoint.write_sums(small_weights)
    with pytest.raises(checkpoint.PocketError, match="lacks 'latent_mean'"):
        checkpoint.build(tmp_path / "pocket.safetensors", small_weights)


def test_shipped_weights_match_their_sums():
    sums = (checkpoint.WEIGHTS / checkpoint.SUMS).read_text(encoding="ascii")
    for line in sums.splitlines():
        digest, name = line.split()
        assert checkpoint._sha256(checkpoint.WEIGHTS / name) == digest, name
    total = sum(path.stat().st_size for path in checkpoint.WEIGHTS.glob("*.safetensors"))
    assert total <= 48 * 2**20
