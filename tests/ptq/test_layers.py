"""Layers solved together: stacking rows and taking them apart again changes nothing but the
time."""

from dataclasses import replace

import pytest
import torch

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.layers import better_of, by_spec, report_layer, split
from llmq.ptq.methods import method_named
from llmq.ptq.methods.gptq import METHOD as GPTQ
from llmq.ptq.methods.rtn import rtn
from llmq.ptq.solver import RowErrors
from llmq.ptq.stats import LayerStats, output_error
from llmq.recipe import Recipe


@pytest.mark.parametrize("text", ["w4g32", "w2g64-asym", "w8"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_stacked_layers_are_layers_solved_alone(text, method, stats):
    recipe, spec, layer = Recipe.uniform(text, method=method), QuantSpec.parse(text), stats(64)
    weights = [torch.randn(n, 64) for n in (16, 8, 24)]
    together = split(
        method_named(method).solve(torch.cat(weights), layer, spec, recipe),
        [len(weight) for weight in weights],
    )
    for weight, part in zip(weights, together, strict=True):
        alone = method_named(method).solve(weight, layer, spec, recipe).tensor
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
    result = GPTQ.solve(weight, layer, spec, Recipe.uniform("w3g32"))
    monkeypatch.setattr("llmq.ptq.solver.ROW_BLOCK_BYTES", 7 * weight[0].nbytes)
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


def test_errors_are_distances_from_what_the_layer_was_solved_for():
    """Inputs that lack a part of those of the full-precision model, which the weights can make up
    for: plain rounding does not, and against the uncorrected outputs the correction is an error."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4096, 64, generator=generator), torch.randn(16, 64)
    y = x + 0.2 * x.roll(1, dims=1)
    stats = LayerStats(64, cross=True, projection=weight)
    stats.add(x, y @ weight.T)
    stats.finish()
    recipe = Recipe.uniform("w4g32", alpha=1.0)
    result = GPTQ.solve(weight, stats, QuantSpec.parse("w4g32"), recipe)
    report = report_layer("layer", weight, result, stats)
    quantized = result.tensor.dequantize()
    exact = y @ weight.T
    distance = (x @ quantized.T - exact).square().sum() / exact.square().sum()
    assert report.exact_error == pytest.approx(float(distance), rel=1e-3)
    assert report.target == "corrected"
    assert report.error < 0.02 < report.rtn_error
    uncorrected = output_error(quantized - weight, stats.hessian)
    assert uncorrected / output_error(weight, stats.hessian) > report.rtn_error / 2
    plain = report_layer("layer", weight, replace(result, errors=None), stats)
    assert plain.target == "weights"


@pytest.mark.parametrize("is_worse", [False, True])
def test_plain_rounding_is_kept_where_it_is_nearer(is_worse, stats):
    weight, spec, layer = torch.randn(40, 64), QuantSpec.parse("w3g32"), stats(64)
    result = GPTQ.solve(weight, layer, spec, Recipe.uniform("w3g32"))
    assert float(result.errors.result.sum()) < float(result.errors.rounding.sum())
    if is_worse:
        errors = RowErrors(2 * result.errors.rounding, result.errors.rounding)
        result = replace(result, errors=errors)
    kept = better_of(result, weight)
    report = report_layer("layer", weight, kept, layer)
    assert report.kept_rounding is kept.is_rounding is is_worse
    rounded = QuantizedTensor.quantize(weight, spec)
    assert torch.equal(kept.tensor.packed, rounded.packed) is is_worse
    assert report.error == report.rtn_error if is_worse else report.error < report.rtn_error


def test_without_data_the_error_is_that_of_the_weights():
    weight = torch.randn(8, 64)
    report = report_layer("layer", weight, rtn(weight, QuantSpec.parse("w2g32")), None)
    difference = QuantizedTensor.quantize(weight, QuantSpec.parse("w2g32")).dequantize() - weight
    expected = float(difference.square().sum() / weight.square().sum())
    assert report.weight_error == pytest.approx(expected)
    assert (report.error, report.rtn_error, report.target) == (None, None, None)
