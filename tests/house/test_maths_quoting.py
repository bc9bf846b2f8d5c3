"""How errors quote what they were given: briefly, on one line, whatever it is."""

import pytest
from palimpsest.nodes.quoting import MOST_LETTERS, quoted

DEEP = []
for _ in range(10_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a dog", "'a dog'"),
        ("x" * 60, repr("x" * 60)),
        ("x" * 61, repr("x" * 60) + "..."),
        ("a\nb\0c", r"'a\nb\x00c'"),
        ("\ud800", r"'\ud800'"),
        ("\u72d7", "'\u72d7'"),
        (None, "None"),
        (0.5, "0.5"),
        ([1, 2], "[1, 2]"),
        (DEEP, "[[[[...]]]]"),
    ],
)
def test_a_value_is_quoted(value, said):
    assert quoted(value) == said


def test_nothing_is_quoted_at_length():
    for value in (10**9, 10**200, 10**6000, [10**6000], list(range(10**5)), {"a" * 10**6: 1}, b"x" * 10**6, object()):
        said = quoted(value)
        assert len(said) <= MOST_LETTERS + 3
        assert "\n" not in said
