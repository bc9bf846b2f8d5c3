"""Attention fusion: which words are the same, and the maps written down against what needs none of them."""

import itertools
import math
import time

import pytest
import torch
from palimpsest.kernels import attention_fusion as maths
from palimpsest.kernels.kv_inversion import attention


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def words(text):
    """Each word takes one token, a word with a hyphen one for each part."""
    counter = itertools.count(1)
    return [(word, tuple(next(counter) for _ in word.split("-"))) for word in text.split()]


def shares(query, key):
    """softmax(Q K^T / sqrt(d)), one head."""
    return torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), -1)


# ---- words


def test_common_words_in_order():
    assert maths.common(["a", "red", "cat"], ["a", "blue", "cat"]) == [(0, 0), (2, 2)]
    assert maths.common(["a", "cat"], ["a", "very", "big", "cat"]) == [(0, 0), (1, 3)]
    assert maths.common([], ["cat"]) == []
    assert maths.common(["cat", "dog"], ["dog", "cat"]) in ([(0, 1)], [(1, 0)])


def score_of_needleman_wunsch(source, edit):
    """Match 1, mismatch -1, gap 0, as Prompt-to-Prompt aligns."""
    best = [[0] * (len(edit) + 1) for _ in range(len(source) + 1)]
    for i, j in itertools.product(range(len(source)), range(len(edit))):
        diagonal = best[i][j] + (1 if source[i] == edit[j] else -1)
        best[i + 1][j + 1] = max(diagonal, best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def every_sequence(letters, longest):
    return [s for length in range(longest + 1) for s in itertools.product(letters, repeat=length)]


def test_no_alignment_has_more_common_words():
    """Of every pair of sequences of up to five words of two: a slip at the edges shows in a few of them only."""
    for source, edit in itertools.product(every_sequence("ab", 5), repeat=2):
        pairs = maths.common(source, edit)
        assert len(pairs) == score_of_needleman_wunsch(source, edit), (source, edit)
        assert all(source[i] == edit[j] for i, j in pairs)
        assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))


def test_of_several_alignments_it_is_the_first_in_the_edit():
    def words(sequence, positions):
        return tuple(sequence[position] for position in positions)

    for source, edit in itertools.product(every_sequence("abc", 3), repeat=2):
        found = tuple(j for _, j in maths.common(source, edit))
        in_source = {words(source, chosen) for chosen in itertools.combinations(range(len(source)), len(found))}
        as_long = [js for js in itertools.combinations(range(len(edit)), len(found)) if words(edit, js) in in_source]
        assert found == min(as_long), (source, edit)


def test_prompts_of_thousands_of_words_are_compared_in_a_second():
    generator = torch.Generator().manual_seed(0)
    source, edit = torch.randint(8, (2, 3000), generator=generator).tolist()
    began = time.process_time()
    pairs = maths.common(source, edit)
    assert len(pairs) > 1500
    assert time.process_time() - began < 5  # the comparison of single letters in Python took 20


def test_kept_words_take_the_sources_maps_and_new_ones_their_own():
    link, new = maths.kept_words(words("a red cat"), words("a very blue cat"))
    assert new.tolist() == [1, 0, 1, 1, 0]  # token 0 is the host's own
    expected = torch.zeros(4, 5)
    expected[1, 1] = expected[3, 4] = 1
    assert torch.equal(link, expected)


def test_replaced_words_take_the_map_of_what_they_replace():
    link, new = maths.replaced_words(words("a red cat"), words("a blue cat"))
    assert link[2, 2] == 1
    assert new[1:].tolist() == [0, 0, 0]
    link, new = maths.replaced_words(words("a cat here"), words("a polar-bear here"))
    assert link[2].tolist() == [0, 0, 0.5, 0.5, 0]  # in equal parts
    assert link[3, 4] == 1
    _, new = maths.replaced_words(words("a cat"), words("a cat here"))
    assert new[3] == 1  # nothing stood there


# ---- maps


@pytest.mark.parametrize("rule", [maths.kept_words, maths.replaced_words])
def test_fused_cross_attention_needs_no_maps(rule):
    link, own = (t.double() for t in rule(words("a red cat"), words("a very blue cat")))
    own[2] *= 3  # emphasis
    source, edit = len(link), len(own)
    q_source, k_source, q, k, v = (
        random(2, n, 4, seed=seed) for seed, n in enumerate((5, source, 5, edit, edit))
    )  # fmt: skip
    expected = maths.fused_cross_map(shares(q_source, k_source), shares(q, k), link, own) @ v
    found = attention(q_source, k_source, maths.linked_values(v, link), 1) + attention(q, k, v * own[:, None], 1)
    torch.testing.assert_close(found, expected)


def test_equal_prompts_at_equal_latents_fuse_to_the_plain_attention():
    link, own = (t.double() for t in maths.kept_words(words("a red cat"), words("a red cat")))
    link[0, 0], own[0] = 1, 0
    q, k, v = random(1, 5, 4), random(1, 4, 4, seed=1), random(1, 4, 4, seed=2)
    fused = maths.fused_cross_map(shares(q, k), shares(q, k), link, own) @ v
    torch.testing.assert_close(fused, attention(q, k, v, 1))


def test_fused_self_attention_needs_no_maps():
    q_source, k_source, q, k, v = (random(2, 6, 4, seed=seed) for seed in range(5))
    mask = (random(2, 6, 1, seed=9) > 0).double()
    expected = maths.fused_self_map(shares(q_source, k_source), shares(q, k), mask) @ v
    found = torch.lerp(attention(q_source, k_source, v, 1), attention(q, k, v, 1), mask)
    torch.testing.assert_close(found, expected)


# ---- the mask


def test_the_mask_is_where_the_words_act():
    mass = torch.zeros(2, 5, 5)
    mass[0, 0, 0], mass[0, 4, 4] = 0.8, 0.2  # a quarter of the strongest
    mass[1] = 0.01  # every picture by its own strongest place
    mask = maths.blend_mask(mass, 0.3)
    assert mask[0, :2, :2].eq(1).all()
    assert mask[0].sum() == 4
    assert mask[1].eq(1).all()
    assert maths.blend_mask(mass, 0.2)[0].sum() == 8
    assert maths.blend_mask(mass, 1.0).sum() == 0
    assert maths.blend_mask(mass.half(), 0.3).dtype == torch.float16
