"""Scales fitted without text: never worse than the first in what they minimise, less moved by
outliers than rounding, and the representation of every other method."""

import pytest
import torch

import llmq
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.job import prepare
from llmq.ptq.methods.hqq import hqq
from llmq.ptq.run import quantize_folder
from llmq.recipe import Recipe

SPECS = ["w4g128", "w3g64-asym", "w2g32-asym", "w8", "w4-tensor", "ternary-g32", "w4g48"]


def distance(tensor, weight):
    return float((tensor.dequantize() - weight).square().square().sum())


@pytest.mark.parametrize("text", SPECS)
def test_closer_than_rounding_in_what_it_minimises(text):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 256, generator=generator)
    weight[:, ::64] *= 8
    spec = QuantSpec.parse(text)
    fitted = hqq(weight, spec)
    fitted.validate("weight")
    assert distance(fitted, weight) < distance(QuantizedTensor.quantize(weight, spec), weight)


def test_an_outlier_keeps_its_place():
    """Scales searched by the squared error give it up for the others; what it multiplies stands
    out, too."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 128, generator=generator)
    weight[:, 0] = 6.0
    spec = QuantSpec.parse("w3g128")
    clipped = [
        float((6.0 - tensor.dequantize()[:, 0]).abs().max())
        for tensor in (
            hqq(weight, spec),
            QuantizedTensor.quantize(weight, spec, torch.ones(128)),
        )
    ]
    assert clipped[0] < 0.5 * clipped[1]


def test_a_weight_on_the_grid_stays():
    spec = QuantSpec.parse("w4g32-asym")
    weight = QuantizedTensor.quantize(torch.randn(8, 64), spec).dequantize()
    assert torch.equal(hqq(weight, spec).dequantize(), weight)


def test_rows_are_solved_alone(monkeypatch):
    from llmq.ptq.methods import hqq as module

    weight, spec = torch.randn(24, 64), QuantSpec.parse("w4g32")
    together = module.METHOD.solve(weight, None, spec, Recipe()).tensor
    monkeypatch.setattr("llmq.ptq.solver.ROW_BLOCK_BYTES", 5 * weight[0].nbytes)
    alone = module.METHOD.solve(weight, None, spec, Recipe()).tensor
    assert torch.equal(together.dequantize(), alone.dequantize())


@torch.no_grad()
def test_a_model_without_text(tmp_path):
    """Nearer to the model than rounding."""
    tokens = torch.randint(2, 2048, (8, 128), generator=torch.Generator().manual_seed(2))
    exact = llmq.load("tiny", dtype="float32")(tokens, use_cache=False).logits
    distances = []
    for method in ("hqq", "rtn"):
        recipe = Recipe.uniform("w3g64-asym", method=method)
        job = prepare("tiny", recipe)
        assert job.tokens is None
        quantize_folder(job, tmp_path / method)
        logits = llmq.load(tmp_path / method, dtype="float32")(tokens, use_cache=False).logits
        distances.append(float((logits - exact).norm()))
    assert distances[0] < distances[1]
