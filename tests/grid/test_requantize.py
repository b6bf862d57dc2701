"""Quantizing again after a small change: never worse than the old grid, never worse than a new
one."""

import dataclasses

import pytest
import torch

from llmq.grid.requantize import requantize
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

N, K = 16, 96


def error(tensor, weight):
    return float((tensor.dequantize() - weight).square().sum())


@pytest.mark.parametrize("text", ["w4g32", "w3g32-asym", "w8", "w2g64", "ternary-tensor"])
@pytest.mark.parametrize("size", [0.0, 0.002, 0.3])
def test_it_is_as_good_as_the_better_of_two_grids(text, size):
    spec = QuantSpec.parse(text)
    generator = torch.Generator().manual_seed(0)
    old = QuantizedTensor.quantize(torch.randn(N, K, generator=generator), spec)
    weight = old.dequantize() + size * torch.randn(N, K, generator=generator)
    new = requantize(old, weight)
    new.validate("layer")
    assert new.spec == spec
    kept = QuantizedTensor.round(
        weight, old.scale.float(), None if old.zero is None else old.zero.float(), spec
    )
    fresh = QuantizedTensor.quantize(weight, spec)
    assert error(new, weight) <= min(error(kept, weight), error(fresh, weight)) * (1 + 1e-6)
    if size == 0:
        assert torch.equal(new.dequantize(), weight)


def test_the_order_of_columns_and_the_range_of_inputs_stay():
    weight, order = torch.randn(N, K), torch.randperm(K)
    spec = QuantSpec.parse("w4g32")
    plain = QuantizedTensor.quantize(weight[:, order], spec)
    g_idx = torch.empty(K, dtype=torch.int32)
    g_idx[order] = torch.arange(K, dtype=torch.int32) // 32
    inverse = torch.argsort(order)
    old = QuantizedTensor.from_codes(plain.codes()[:, inverse], plain.scale, None, spec, g_idx)
    old = dataclasses.replace(old, input_range=torch.tensor([0.1, 128.0]))
    assert torch.equal(old.dequantize()[:, order], plain.dequantize())
    changed = 3 * weight  # far from the old grid: the new one is that of the sorted columns
    new = requantize(old, changed)
    assert torch.equal(new.g_idx, g_idx)
    assert torch.equal(new.input_range, old.input_range)
    fresh = QuantizedTensor.quantize(changed[:, order], spec)
    assert torch.equal(new.dequantize()[:, order], fresh.dequantize())
    uneven = dataclasses.replace(old, g_idx=torch.zeros(K, dtype=torch.int32))
    requantize(uneven, uneven.dequantize()).validate("layer")


@pytest.mark.parametrize("text", ["w4g32", "w3g32-asym", "ternary-tensor"])
def test_by_chance_a_value_is_kept_on_average(text):
    generator = torch.Generator().manual_seed(0)
    old = QuantizedTensor.quantize(torch.randn(N, K, generator=generator), QuantSpec.parse(text))
    before = old.dequantize()
    change = 0.1 * old.scale.float().mean() * torch.randn(N, K, generator=generator)
    by_chance = (
        sum(requantize(old, before + change, generator).dequantize() for _ in range(50)) / 50
    )
    to_nearest = requantize(old, before + change).dequantize()
    kept, lost = (
        float(((after - before) * change).sum() / change.square().sum())
        for after in (by_chance, to_nearest)
    )
    # The outermost codes cannot move outwards, and ternary ones are mostly these.
    assert kept > (0.5 if "ternary" in text else 0.8)
    assert lost < 0.3
