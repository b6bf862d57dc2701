"""How weights are stored in blocks: exactly wherever a type of blocks holds the codes."""

import pytest
import torch

from llmq.formats.gguf.blocks import dequantize
from llmq.formats.gguf.fit import encode, fit
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor

N, K = 6, 512


def stored(qtensor):
    """The type, the values in the file, and the largest error."""
    chosen = fit(qtensor)
    content, distance = encode(qtensor, chosen)
    error = distance.largest
    shape = qtensor.shape
    if chosen.type.name == "F32":
        return chosen, content.view(torch.float32).view(shape), error
    assert content.shape == (shape[0], shape[1] // chosen.type.block * chosen.type.n_bytes)
    return chosen, dequantize(chosen.type.name, content, shape), error


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("w8", "Q8_0"),
        ("w8g32", "Q8_0"),
        ("w6g64-asym", "Q8_0"),
        ("w5g128", "Q8_0"),
        ("w4g32", "Q4_0"),
        ("w4g128", "Q4_0"),
        ("w4", "Q4_0"),
        ("w4-tensor", "Q4_0"),
        ("w3g64", "Q4_0"),
        ("w3g64-asym", "Q4_0"),
        ("w2g64", "Q2_0"),
        ("w2g32", "Q4_0"),
        ("w2g128-asym", "Q4_0"),
        ("w2h-g64", "Q4_0"),
        ("ternary-tensor", "TQ2_0"),
        ("ternary-g256", "TQ2_0"),
        ("ternary", "TQ2_0"),
        ("ternary-g64", "Q2_0"),
        ("ternary-g128", "Q2_0"),
        ("ternary-g32", "Q4_0"),
    ],
)
def test_values_are_those_of_the_weight(spec, expected):
    torch.manual_seed(0)
    weight = torch.randn(N, K) * torch.rand(N, 1)
    qtensor = QuantizedTensor.quantize(weight, QuantSpec.parse(spec))
    chosen, values, error = stored(qtensor)
    assert chosen.type.name == expected
    assert chosen.reason is None
    assert error == 0
    assert torch.equal(values, qtensor.dequantize())


def with_zero_points(scale, zero):
    codes = torch.randint(0, 16, (N, K)).to(torch.uint8)
    shape = (N, K // 64)
    return QuantizedTensor.from_codes(
        codes, torch.full(shape, scale), torch.full(shape, zero), QuantSpec.parse("w4g64-asym")
    )


def test_zero_points_whose_products_are_float16_numbers_are_exact():
    qtensor = with_zero_points(0.125, 11)
    chosen, values, error = stored(qtensor)
    assert (chosen.type.name, chosen.reason, error) == ("Q4_1", None, 0)
    assert torch.equal(values, qtensor.dequantize())


def test_zero_points_whose_products_are_not_are_counted():
    scale = float(torch.tensor(0.1).half())
    qtensor = with_zero_points(scale, 11)
    chosen, values, error = stored(qtensor)
    assert chosen.reason == f"{N * 8} of {N * 8} products -s z are not float16 numbers"
    assert chosen.type.name == "Q4_1"
    assert error == float((values - qtensor.dequantize()).abs().max())
    assert 0 < error < 1e-3


def test_scales_beyond_float16_are_counted():
    spec = QuantSpec("int4", 64, scale_dtype="float32")
    qtensor = QuantizedTensor.quantize(torch.randn(N, K), spec)
    chosen, values, error = stored(qtensor)
    assert "scales are not float16 numbers" in chosen.reason
    assert torch.allclose(values, qtensor.dequantize(), rtol=1e-3)
    assert error > 0


@pytest.mark.parametrize("kind", ["act-order", "levels", "columns"])
def test_what_no_blocks_hold_is_rounded_to_8_bits(kind):
    spec = QuantSpec.parse("w8g64-asym" if kind == "levels" else "w4g64")
    k = 520 if kind == "columns" else K
    weight = torch.randn(N, k)
    qtensor = QuantizedTensor.quantize(weight, spec)
    if kind == "act-order":
        order = torch.randperm(k) // 64
        codes, scale = qtensor.codes(), qtensor.scale.float()
        qtensor = QuantizedTensor.from_codes(codes, scale, None, spec, order.to(torch.int32))
    chosen, values, error = stored(qtensor)
    assert chosen.reason is not None
    assert chosen.type.name == ("F32" if kind == "columns" else "Q8_0")
    assert float((values - qtensor.dequantize()).abs().max()) == error
    assert error <= float(weight.abs().max()) / 127
