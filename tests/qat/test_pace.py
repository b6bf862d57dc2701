"""Masters go by their grid and by the length of the run, and start off the edge by as much as noise
may move them."""

import pytest

from llmq.grid.spec import QuantSpec
from llmq.qat.pace import HASTE, LONG_RUN, WIDEST, grid_rate, margin, reaches_edge

SPEC = QuantSpec("int2", 32, symmetric=False)


@pytest.mark.parametrize(
    ("n_steps", "haste"),
    [
        (None, 1),
        (10_000, 1),
        (LONG_RUN, 1),
        (LONG_RUN // 4, 2),
        (LONG_RUN // 16, HASTE),
        (1, HASTE),
    ],
)
def test_short_runs_go_faster(n_steps, haste):
    assert grid_rate(SPEC, n_steps) == pytest.approx(haste * grid_rate(SPEC))


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_from_4_bits_on_masters_move_by_the_same_share_of_the_range(bits):
    """In short runs, too: at four times as much a real model loses what it knows."""
    for n_steps in (None, 40):
        rate = grid_rate(QuantSpec.parse(f"w{bits}g32"), n_steps)
        assert rate / (2**bits - 1) == pytest.approx(grid_rate(QuantSpec.parse("w4g32")) / 15)


def test_the_distance_from_the_edge_is_a_number_of_updates():
    assert margin(0.004) == pytest.approx(0.1)
    assert margin(0.008) == pytest.approx(2 * margin(0.004))
    assert margin(1.0) == WIDEST
    assert WIDEST < 0.5  # where masters would start is the middle of the cell


@pytest.mark.parametrize(
    ("spec", "fewest"), [("w8g32", 18), ("w4g32", 51), ("w2g32-asym", 38), ("ternaryg32", 51)]
)
def test_shorter_runs_change_no_code(spec, fewest):
    """Half as many updates as they start from the edge in, or those that the widest margin
    takes."""
    spec = QuantSpec.parse(spec)
    assert [reaches_edge(spec, n) for n in (fewest - 1, fewest)] == [False, True]
