"""The equations of an edit head's training, in float64."""

import math

import pytest
import torch
from palimpsest.kernels import feature_blend
from palimpsest.kernels import instruction_head as maths
from palimpsest.kernels.edit_head import EditHeadConfig, EditMapper
from palimpsest.nodes.feature_blend.opponent import Opponent

WIDE = torch.float64


def test_the_words_and_half_of_the_edit():
    words, edit = torch.tensor([1.0, 2.0], dtype=WIDE), torch.tensor([4.0, 6.0], dtype=WIDE)
    assert maths.joint_loss(words, edit).tolist() == [3.0, 5.0]


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=WIDE)
    found = maths.spoken_loss(logits, torch.tensor([1, 0]))
    assert float(found) == pytest.approx((-math.log(0.75) - math.log(0.5)) / 2, abs=1e-12)
    assert maths.spoken_loss(logits.half(), torch.tensor([1, 0])).dtype == torch.float32


def test_rows_say_their_tokens_alone_and_get_the_gradient():
    states, table = torch.randn(3, 5, dtype=WIDE), torch.randn(7, 5, dtype=WIDE)
    rows = torch.randn(2, 5, dtype=WIDE, requires_grad=True)
    found = maths.with_rows(states @ table.T, states, rows, [6, 1])
    whole = table.clone()
    whole[[6, 1]] = rows.detach()
    torch.testing.assert_close(found, states @ whole.T)
    assert torch.autograd.gradcheck(lambda r: maths.with_rows(states @ table.T, states, r, [6, 1]), rows)
    assert torch.equal(maths.with_rows(states @ table.T, states, table[[6, 1]], [6, 1]), found.detach()) is False


def test_the_error_of_a_prompt_is_each_ones_mean():
    prompt = torch.zeros(2, 3, 4, dtype=WIDE)
    wanted = torch.stack([torch.full((3, 4), 2.0), torch.full((3, 4), 3.0)])
    assert maths.prompt_error(prompt, wanted).tolist() == [4.0, 9.0]


def test_whitened_rows_have_one_spread_in_every_direction():
    rows = torch.randn(4000, 3, dtype=WIDE) @ torch.diag(torch.tensor([10.0, 1.0, 0.1], dtype=WIDE))
    rows = rows - rows.mean(0)
    white = rows @ maths.whitening(rows, 3, floor=0.0).T
    torch.testing.assert_close(white.T @ white / len(rows), torch.eye(3, dtype=WIDE), rtol=1e-9, atol=1e-9)
    assert maths.whitening(rows, 5).shape == (5, 3)
    assert not maths.whitening(rows, 5)[3:].any()


@pytest.mark.parametrize("count", [1, 300])
def test_a_head_begins_with_the_mean_prompt(count):
    """With its branches weighed down to nothing a head says the texts' mean prompt, whatever the states; odd sizes."""
    torch.manual_seed(0)
    config = EditHeadConfig(hidden=10, width=24, heads=4, layers=1, feed_forward=12, queries=7, context=20)
    head = EditMapper(config, torch.nn)
    mean = torch.nn.functional.layer_norm(torch.randn(7, 20), (20,))
    prompts, states = mean + 1e-3 * torch.randn(count, 7, 20), 5 + 0.1 * torch.randn(count, 8, 10)
    maths.begin_where_texts_are(head, states, prompts, small=0.0)
    made = head(states, torch.zeros(8, 10))
    assert (made - prompts.mean(0)).square().mean() < 0.1 * prompts.var()
    seen = head.llm2hid(states)
    assert seen.isfinite().all()
    assert seen.square().mean() < 2.0


def test_the_adversary_by_hand():
    """Hinge: E max(0, 1 - D(true)) + E max(0, 1 + D(false)); the other side is - E D(false)."""
    true, false = torch.tensor([2.0, 0.5], dtype=WIDE), torch.tensor([-3.0, 0.25], dtype=WIDE)
    assert float(feature_blend.discriminator_loss(true, false)) == (0 + 0.5) / 2 + (0 + 1.25) / 2
    assert float(feature_blend.generator_loss(false)) == 1.375


def test_an_opponent_learns_to_tell_and_draws_towards_the_true():
    clean = torch.randn(8, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    opponent, false = Opponent(clean, 0), torch.zeros(8, 4, 12, 12, requires_grad=True)
    first = opponent.loss(false, clean)
    for _ in range(30):
        last = opponent.loss(false, clean)
    assert last > first  # it is told apart better
    (gradient,) = torch.autograd.grad(opponent.loss(false, clean), false)
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in opponent.network.parameters())
