"""The same values under another spec: bit for bit, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmq.grid.recode import recode, specs_for
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

WEIGHT = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))


def quantized(spec: str) -> QuantizedTensor:
    return QuantizedTensor.quantize(WEIGHT, QuantSpec.parse(spec))


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        ("w4g128", "w4g64"),
        ("w4", "w4g32"),
        ("w4g128", "w4g128-asym"),
        ("w4g128", "w8g128"),
        ("w3g64-asym", "w4g64-asym"),
        ("ternary-g128", "w2g128"),
        ("w4-tensor", "w4"),
    ],
)
def test_the_values_stay_bit_for_bit(spec: str, target: str) -> None:
    before = quantized(spec)
    after = recode(before, QuantSpec.parse(target))
    assert after is not None
    after.validate("layer")
    assert str(after.spec) == target
    assert torch.equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        ("w4g64", "w4g128"),  # two scales where one is stored
        ("w4g64-asym", "w4g64"),  # zero points that are not in the middle
        ("w4g128", "w2g128"),  # more codes than there are
        ("w2h-g64", "w4g64"),  # half steps
        ("w4", "w4-tensor"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, target: str) -> None:
    assert recode(quantized(spec), QuantSpec.parse(target)) is None


def test_zero_points_in_the_middle_need_not_be_stored() -> None:
    before = quantized("w4g64")
    stored = recode(before, QuantSpec.parse("w4g64-asym"))
    assert stored is not None
    again = recode(stored, QuantSpec.parse("w4g64"))
    assert again is not None
    assert torch.equal(again.packed, before.packed)


def test_an_order_of_columns_is_given_up_only_where_it_says_nothing() -> None:
    plain = quantized("w4g64")
    trivial = replace(plain, g_idx=torch.arange(256, dtype=torch.int32) // 64)
    found = recode(trivial, plain.spec)
    assert found is not None
    assert found.g_idx is None
    turned = replace(plain, g_idx=torch.arange(256, dtype=torch.int32) % 4)
    assert recode(turned, plain.spec) is None


def test_scales_go_into_a_dtype_only_where_it_holds_them() -> None:
    plain = quantized("w4g64")
    wide = replace(plain.spec, scale_dtype="float32")
    held = replace(plain, scale=plain.scale.float(), spec=wide)
    assert recode(held, plain.spec) is not None
    finer = replace(held, scale=held.scale * (1 + 2**-20))
    assert recode(finer, plain.spec) is None


def test_the_smallest_comes_first_after_the_own() -> None:
    spec = QuantSpec.parse("ternary-g128")
    found = specs_for(spec, (24, 256))
    bits = [each.bits_per_weight(24, 256) for each in found[1:]]
    assert found[0] == spec
    assert bits == sorted(bits)
    assert str(found[1]) == "w2g128"
    assert all(each.bits >= spec.bits for each in found)
