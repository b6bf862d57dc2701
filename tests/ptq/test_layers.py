"""Layers solved together: stacking rows and taking them apart again changes nothing but the
time."""

import pytest
import torch

from llmq.ptq.layers import by_spec, report_layer, solve, split
from llmq.ptq.stats import output_error
from llmq.qtensor import QuantizedTensor
from llmq.recipe import Recipe
from llmq.spec import QuantSpec


@pytest.mark.parametrize("text", ["w4g32", "w2g64-asym", "w8"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_stacked_layers_are_layers_solved_alone(text, method, stats):
    recipe, spec, layer = Recipe.uniform(text, method=method), QuantSpec.parse(text), stats(64)
    weights = [torch.randn(n, 64) for n in (16, 8, 24)]
    together = split(
        solve(torch.cat(weights), layer, spec, recipe), [len(weight) for weight in weights]
    )
    for weight, part in zip(weights, together, strict=True):
        alone = solve(weight, layer, spec, recipe).tensor
        part.tensor.validate("weight")
        assert (
            float((part.tensor.codes() != alone.codes()).float().mean()) < 0.01
        )  # products of other shapes may round the last bit another way
        assert torch.allclose(
            part.tensor.dequantize(), alone.dequantize(), atol=0.3 * float(alone.scale.max())
        )


def test_other_specs_and_scales_of_whole_tensors_stay_apart():
    four, two, whole = (
        QuantSpec.parse("w4g32"),
        QuantSpec.parse("w2g32-asym"),
        QuantSpec.parse("w4-tensor"),
    )
    parts = list(
        by_spec(
            ["q", "k", "v", "gate", "up"],
            {"q": four, "k": two, "v": four, "gate": whole, "up": whole},
        )
    )
    assert parts == [(["q", "v"], four), (["k"], two), (["gate"], whole), (["up"], whole)]


def test_errors_reported_by_rows_are_those_of_the_whole(stats, monkeypatch):
    weight, spec, layer = torch.randn(40, 64), QuantSpec.parse("w3g32"), stats(64)
    result = solve(weight, layer, spec, Recipe.uniform("w3g32"))
    monkeypatch.setattr("llmq.ptq.gptq.ROW_BLOCK_BYTES", 7 * weight[0].nbytes)
    report = report_layer("layer", weight, result, layer)
    energy = output_error(weight, layer.hessian)
    assert report.error == pytest.approx(
        output_error(result.tensor.dequantize() - weight, layer.hessian) / energy, rel=1e-4
    )
    assert report.rtn_error == pytest.approx(
        output_error(QuantizedTensor.quantize(weight, spec).dequantize() - weight, layer.hessian)
        / energy,
        rel=1e-4,
    )
