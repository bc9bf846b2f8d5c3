"""Equations 1 to 3 of KV Inversion, by hand and against the host-free attention of PyTorch."""

import pytest
import torch
from palimpsest.kernels.kv_inversion import (
    attention,
    between_keyframes,
    content_preserving,
    content_preserving_folded,
    reconstruction_loss,
    self_similarity_distance,
    source_guidance,
)


def test_content_preserving_by_hand():
    k, k_hat = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[10.0, -4.0]]])
    torch.testing.assert_close(content_preserving(k, k_hat, 0.5, 2.0), torch.tensor([[[20.5, -7.0]]]))


def test_content_preserving_starts_as_the_identity():
    k = torch.randn(3, 35, 6)
    assert torch.equal(content_preserving(k, torch.zeros(1, 35, 6), 1.0, 1.0), k)


def test_weights_may_differ_by_picture_and_dtype_is_the_layers():
    k, k_hat = torch.randn(2, 5, 4, dtype=torch.float16), torch.randn(2, 5, 4)
    own, learned = torch.tensor([1.0, 0.0]).view(2, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    out = content_preserving(k, k_hat, own, learned)
    assert out.dtype == torch.float16
    assert torch.equal(out[0], k[0])
    assert torch.equal(out[1], k_hat[1].half())


def test_another_grid_is_refused_by_its_numbers():
    with pytest.raises(ValueError, match=r"\(64, 8\).*\(63, 8\)"):
        content_preserving(torch.zeros(1, 63, 8), torch.zeros(1, 64, 8), 1.0, 1.0)


def test_the_gradient_reaches_the_embedding_at_its_start():
    k_hat = torch.zeros(1, 5, 4, requires_grad=True)
    content_preserving(torch.randn(1, 5, 4), k_hat, 1.0, 1.0).square().sum().backward()
    assert k_hat.grad.abs().max() > 0


@pytest.mark.parametrize(("tokens", "keys", "heads", "width"), [(5, 5, 1, 3), (123, 77, 4, 40), (64, 128, 8, 20)])
def test_attention_is_softmax_of_scaled_products(tokens, keys, heads, width):
    q = torch.randn(2, tokens, heads * width, dtype=torch.float64)
    k, v = torch.randn(2, 2, keys, heads * width, dtype=torch.float64)
    split = [t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v)]
    fused = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(q, k, v, heads), fused, rtol=1e-10, atol=1e-10)


def test_attention_by_hand():
    q, k = torch.tensor([[[0.0]]]), torch.tensor([[[3.0], [-5.0]]])
    v = torch.tensor([[[2.0], [6.0]]])
    torch.testing.assert_close(attention(q, k, v, 1), torch.tensor([[[4.0]]]))  # equal scores: the mean of the values


def test_repeated_keys_change_nothing():
    q, k, v = torch.randn(3, 1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k.repeat(1, 2, 1), v.repeat(1, 2, 1), 2), attention(q, k, v, 2))


def test_reconstruction_loss_is_per_picture_and_in_z():
    latent, target = torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 5)
    latent[1] = 3.0
    torch.testing.assert_close(reconstruction_loss(latent, target, 0.5), torch.tensor([0.0, 2.25]))


def test_a_mask_averages_the_loss_over_its_white_part():
    latent, target, mask = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2)
    latent[..., 0, 0], latent[..., 1, 1] = 4.0, 9.0
    mask[..., 0, :] = 1.0
    torch.testing.assert_close(reconstruction_loss(latent, target, 0.5, mask), torch.tensor([2.0]))  # (2^2 + 0) / 2
    squares = reconstruction_loss(latent, target, torch.full((1, 1, 1, 1), 0.5), torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(squares, reconstruction_loss(latent, target, 0.5))


@pytest.mark.parametrize("masked", [False, True])
def test_the_folded_form_is_equation_1(masked):
    k, k_hat = torch.randn(2, 3, 35, 6, dtype=torch.float64)
    own, learned = torch.rand(2, 3, 1, 1, dtype=torch.float64)
    m = torch.rand(3, 35, 1, dtype=torch.float64) if masked else 1.0
    wanted = k + m * (content_preserving(k, k_hat, own, learned) - k)
    torch.testing.assert_close(content_preserving_folded(k, m * learned * k_hat, 1 + m * (own - 1)), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_folded_form_is_no_less_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    k, k_hat = torch.randn(2, 5, 123, 16, generator=generator).to(dtype)
    own, learned = torch.tensor([[[0.8]]], dtype=dtype), torch.tensor([[[1.25]]], dtype=dtype)
    exact = own.double() * k.double() + learned.double() * k_hat.double()
    plain = (content_preserving(k, k_hat, own, learned).double() - exact).abs().max()
    folded = (content_preserving_folded(k, learned * k_hat, own).double() - exact).abs().max()
    assert folded <= 2 * plain


def test_the_folded_form_starts_as_the_identity():
    k = torch.randn(3, 35, 6)
    assert torch.equal(content_preserving_folded(k, torch.zeros(1, 35, 6), torch.ones(1, 1, 1)), k)


def test_between_keyframes_is_a_straight_line():
    a, b = torch.tensor([2.0, 10.0]), torch.tensor([6.0, -2.0])
    assert between_keyframes(a, b, 0.0).tolist() == [2.0, 10.0]
    assert between_keyframes(a, b, 0.25).tolist() == [3.0, 7.0]
    assert between_keyframes(a, b, 1.0).tolist() == [6.0, -2.0]


def test_self_similarity_sees_layout_and_not_scale():
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    alike = torch.tensor([[[3.0, 0.0], [5.0, 0.0]]])
    torch.testing.assert_close(self_similarity_distance(keys, alike), torch.tensor([0.5]))  # two of four pairs differ
    turned = torch.tensor([[[0.0, 7.0], [-1.0, 0.0]]])
    torch.testing.assert_close(self_similarity_distance(keys, turned), torch.tensor([0.0]))


def test_source_guidance_is_guidance_on_two_conditions():
    nothing, source, both = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64)
    text_scale, source_scale = 5.0, 3.0
    wanted = nothing + source_scale * (source - nothing) + text_scale * (both - source)
    guided = source + text_scale * (both - source)
    torch.testing.assert_close(source_guidance(guided, source, nothing, source_scale), wanted)
    assert torch.equal(source_guidance(guided, source, nothing, 1.0), guided)
