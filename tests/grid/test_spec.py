"""Specs: text and JSON round trips, validation, and the rule for group sizes that do not divide
K."""

import pytest

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec


@pytest.mark.parametrize(
    "text",
    [
        "w4g128",
        "w3g64-asym",
        "w8",
        "w8-asym",
        "w4-tensor",
        "ternary",
        "ternary-g128",
        "ternary-tensor",
        "w2g96",
        "w5g128",
        "w6g64-asym",
    ],
)
def test_text_and_json_round_trip(text):
    spec = QuantSpec.parse(text)
    assert str(spec) == text
    assert QuantSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["w7g128", "4bit", "", "w4g128-sym", "w4-g0-x", "ternary-asym"])
def test_unreadable_text_is_refused_with_the_forms(text):
    with pytest.raises(LlmqError):
        QuantSpec.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"code": "int7"},
        {"group_size": 1},
        {"group_size": -2},
        {"code": "ternary", "symmetric": False},
        {"scale_dtype": "float8"},
    ],
)
def test_invalid_specs_are_refused(arguments):
    with pytest.raises(LlmqError):
        QuantSpec(**arguments)


@pytest.mark.parametrize(
    ("k", "asked", "expected"),
    [
        (4096, 128, 128),
        (576, 128, 64),
        (1600, 128, 64),
        (160, 128, 32),
        (172, 128, None),
        (172, 43, 43),
        (96, 64, 32),
        (300, -1, -1),
        (300, 0, 0),
    ],
)
def test_group_sizes_that_do_not_divide(k, asked, expected):
    fitting = QuantSpec("int4", asked).fit(k)
    assert (None if fitting is None else fitting.group_size) == expected


def test_bits_per_weight_counts_scales_and_zero_points():
    assert QuantSpec("int4", 128).bits_per_weight(4096, 4096) == pytest.approx(4.125)
    assert QuantSpec("int4", 128, symmetric=False).bits_per_weight(4096, 4096) == pytest.approx(
        4.125 + 4 / 128
    )
