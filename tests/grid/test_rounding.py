"""The quantizer's promises: one rounding, the same values with and without integers, and scales
that are what is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import LlmqError
from llmq.grid import rounding
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

SPECS = [
    "w4g128",
    "w4g32-asym",
    "w3g64",
    "w3g64-asym",
    "w2g32-asym",
    "w8",
    "w8-asym",
    "w6g64",
    "w5g32-asym",
    "w4-tensor",
    "ternary-g32",
    "ternary",
    "ternary-tensor",
    "w4g48",
]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("search", [False, True])
def test_fake_quantize_equals_the_stored_weight_bit_for_bit(text, search):
    spec = QuantSpec.parse(text)
    weight = torch.randn(17, 100) * torch.logspace(-4, 1, 17)[:, None]
    scale, zero = rounding.choose_scale(weight, spec, torch.rand(100) if search else None)
    fake = rounding.fake_quantize(weight, scale, zero, spec)
    codes = rounding.quantize(weight, scale, zero, spec)
    stored = QuantizedTensor.from_codes(codes, scale, zero, spec)
    stored.validate("weight")
    assert torch.equal(fake, rounding.dequantize(codes, scale, zero, spec))
    assert torch.equal(fake, stored.dequantize())
    assert torch.equal(stored.codes(), codes)


@given(
    seed=st.integers(0, 2**31),
    text=st.sampled_from(SPECS),
    n=st.integers(1, 5),
    k=st.integers(2, 150),
)
@settings(max_examples=100, deadline=None)
def test_error_is_at_most_half_a_step_inside_the_range(seed, text, n, k):
    spec = QuantSpec.parse(text)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    scale, zero = rounding.choose_scale(weight, spec)
    error = (rounding.fake_quantize(weight, scale, zero, spec) - weight).abs()
    steps = rounding.expand_groups(scale, k, spec.columns_per_group(k))
    if spec.code != "ternary":
        # The scale's own rounding to float16 and the missing positive end of symmetric ranges cost
        # up to half a step more at the edges.
        assert bool((error <= steps * (1.0 + 2**-10 * spec.levels.levels)).all())


def test_definitions_of_the_spec():
    weight = torch.tensor([[-1.0, 0.5, 0.25, 2.0]])
    scale, zero = rounding.choose_scale(weight, QuantSpec("int4", -1, scale_dtype="float32"))
    assert zero is None
    assert scale.item() == pytest.approx(2 * 2.0 / 15)
    scale, zero = rounding.choose_scale(
        weight, QuantSpec("int4", -1, symmetric=False, scale_dtype="float32")
    )
    assert scale.item() == pytest.approx(3.0 / 15)
    assert zero.item() == 5
    scale, zero = rounding.choose_scale(weight, QuantSpec("ternary", 0, scale_dtype="float32"))
    assert scale.item() == pytest.approx(weight.abs().mean())
    assert rounding.quantize(
        weight, scale, zero, QuantSpec("ternary", 0, scale_dtype="float32")
    ).tolist() == [[0, 2, 1, 2]]


def test_ranges_include_zero():
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    scale, zero = rounding.choose_scale(weight, QuantSpec("int4", -1, symmetric=False))
    assert zero.item() == 0
    assert scale.item() == pytest.approx(8 / 15, rel=1e-3)


def test_ties_go_to_even():
    spec = QuantSpec("int4", -1, scale_dtype="float32")
    codes = rounding.quantize(
        torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), torch.ones(1, 1), None, spec
    )
    assert codes.tolist() == [[8, 10, 10, 8, 6]]


def test_an_empty_group_is_exact():
    weight = torch.zeros(2, 64)
    for text in ("w4g32", "w4g32-asym", "ternary-g32"):
        tensor = QuantizedTensor.quantize(weight, QuantSpec.parse(text))
        assert torch.equal(tensor.dequantize(), weight)


def test_scales_beyond_float16_are_refused():
    with pytest.raises(LlmqError, match="bfloat16"):
        QuantizedTensor.quantize(torch.full((1, 32), 1e7), QuantSpec("int4", 32))
    QuantizedTensor.quantize(
        torch.full((1, 32), 1e7), QuantSpec("int4", 32, scale_dtype="bfloat16")
    )


@pytest.mark.parametrize("text", ["w4g32", "w3g32", "w2g32-asym", "w3g32-asym", "ternary-g32"])
def test_search_never_loses_to_the_range_under_its_own_measure(text):
    spec = QuantSpec.parse(text)
    weight, importance = torch.randn(40, 128), torch.rand(128) ** 4
    errors = [
        (
            (QuantizedTensor.quantize(weight, spec, how).dequantize() - weight) ** 2 * importance
        ).sum()
        for how in (importance, None)
    ]
    assert errors[0] < errors[1]


def test_search_finds_the_known_optimum_on_gaussian_rows():
    weight = torch.randn(2048, 128)
    for bits, expected in ((3, 0.75), (2, 0.57)):
        spec = QuantSpec(f"int{bits}", -1, scale_dtype="float32")
        scale, _ = rounding.choose_scale(weight, spec, torch.ones(128))
        full, _ = rounding.range_scale(weight, spec)
        assert float((scale / full).mean()) == pytest.approx(expected, abs=0.05)
