"""Coordinate descent: the error never rises, the representation stays valid, and a minimum is left
alone."""

import itertools

import pytest
import torch

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.methods.gptq import GPTQOptions, gptq
from llmq.ptq.methods.refine import refine
from llmq.ptq.stats import output_error

SPECS = ["w4g128", "w3g64-asym", "w2g64-asym", "w8", "w4-tensor", "ternary-g32", "w4g48"]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("start", ["rtn", "group", "act"])
def test_each_sweep_lowers_the_error(text, start, stats):
    weight, spec, layer = torch.randn(32, 256), QuantSpec.parse(text), stats(256)
    tensor = (
        QuantizedTensor.quantize(weight, spec)
        if start == "rtn"
        else gptq(weight, layer, spec, GPTQOptions(order=start, sweeps=0)).tensor
    )
    errors = [output_error(tensor.dequantize() - weight, layer.hessian)]
    for _ in range(4):
        tensor = refine(weight, tensor, layer.hessian, 1)
        tensor.validate("weight")
        errors.append(output_error(tensor.dequantize() - weight, layer.hessian))
    # Scales are rounded to float16 after least squares: 2^-11 of a scale, far less of the error it
    # already has.
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


def test_one_sweep_over_codes_is_the_exact_minimum_per_column(stats):
    """Against brute force: with all other columns fixed, no other code of the last column does
    better."""
    layer, weight, spec = stats(32), torch.randn(3, 32), QuantSpec("int2", 0)
    tensor = refine(weight, QuantizedTensor.quantize(weight, spec), layer.hessian, 1)
    codes = tensor.codes()

    def row_errors(candidate):
        difference = (
            QuantizedTensor.from_codes(candidate, tensor.scale, None, spec).dequantize() - weight
        )
        return ((difference @ layer.hessian) * difference).sum(1)

    reached = row_errors(codes)
    for code in range(4):
        changed = codes.clone()
        changed[:, -1] = code
        assert bool((row_errors(changed) >= reached * (1 - 1e-5)).all())


def test_an_exact_weight_stays_as_it_is(stats):
    spec = QuantSpec("int4", 32)
    tensor = QuantizedTensor.quantize(torch.randn(8, 64), spec)
    again = refine(tensor.dequantize(), tensor, stats(64).hessian, 3)
    assert torch.equal(again.packed, tensor.packed)
    assert torch.equal(again.scale, tensor.scale)
