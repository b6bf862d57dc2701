"""Masters go by their grid and by the length of the run, and start off the edge by as much as noise
may move them."""

import pytest

from llmq.grid.spec import QuantSpec
from llmq.qat.pace import HASTE, LONG_RUN, WIDEST, grid_rate, margin

SPEC = QuantSpec("int2", 32, symmetric=False)


@pytest.mark.parametrize(
    ("n_steps", "haste"), [(None, 1), (10_000, 1), (LONG_RUN, 1), (150, 2), (75, HASTE), (1, HASTE)]
)
def test_short_runs_go_faster(n_steps, haste):
    assert grid_rate(SPEC, n_steps) == pytest.approx(haste * grid_rate(SPEC))


def test_codes_between_4_and_8_bits_take_the_rate_of_8():
    assert grid_rate(QuantSpec.parse("w5g32")) == grid_rate(QuantSpec.parse("w8"))


def test_the_distance_from_the_edge_is_a_number_of_updates():
    assert margin(0.004) == pytest.approx(0.1)
    assert margin(0.008) == pytest.approx(2 * margin(0.004))
    assert margin(1.0) == WIDEST
    assert WIDEST < 0.5  # where masters would start is the middle of the cell
