"""Changed answers, and how uneven they are."""

from itertools import product

import pytest

from llmq.evaluation.flips import compare_answers, mcnemar


@pytest.mark.parametrize(
    ("n_worse", "n_better", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (10, 2, 158 / 4096),
        (2, 10, 158 / 4096),
        (0, 6, 1 / 32),
    ],
)
def test_mcnemar_by_hand(n_worse, n_better, expected):
    assert mcnemar(n_worse, n_better) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n_worse", "n_better"), [(3, 8), (7, 4), (0, 9)])
def test_mcnemar_against_every_way_the_flips_could_go(n_worse, n_better):
    """The share of all ways that are as uneven as what was seen, or more."""
    n, seen = n_worse + n_better, abs(n_worse - n_better)
    ways = [sum(way) for way in product((0, 1), repeat=n)]
    uneven = sum(abs(n - 2 * ones) >= seen for ones in ways)
    assert mcnemar(n_worse, n_better) == pytest.approx(uneven / 2**n, rel=1e-12)


def test_mcnemar_of_many_flips():
    assert 0 < mcnemar(1300, 1000) < 1e-9
    assert mcnemar(5000, 1000) >= 0  # less than a float holds


def test_each_kind_of_change_is_told():
    found = compare_answers([0, 1, 2, 0, 3], [0, 0, 2, 1, 2], [0, 1, 2, 1, 0])
    assert found == {
        "base_accuracy": 0.6,
        "quant_accuracy": 0.6,
        "right_to_wrong": [{"row": 1, "right": 1, "base": 1, "quant": 0}],
        "wrong_to_right": [{"row": 3, "right": 1, "base": 0, "quant": 1}],
        "wrong_to_wrong": [{"row": 4, "right": 0, "base": 3, "quant": 2}],
        "mcnemar_p": 1.0,
    }
