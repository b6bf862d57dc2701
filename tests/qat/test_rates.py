"""Learning rates follow the grid: a model with weights ten times as large learns ten times as fast,
and in relation to its grid the same."""

import pytest
import torch
from conftest import make_model

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.qat.rates import SCALES, grid_rate, grid_step, parameter_groups
from llmq.qat.settings import QATSettings, Scheme
from llmq.qat.weights import fake_quant_modules, prepare

SPEC = QuantSpec("int2", 32, symmetric=False)


def settings(**options):
    return QATSettings(Scheme(SPEC), init="rtn", sequence_length=32, **options)


def student(factor=1.0, quantizer="lsq", spec=SPEC):
    model = make_model()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    for name in names:
        model.get_submodule(name).weight.data *= factor
    prepare(
        model,
        {
            name: QuantizedTensor.quantize(model.get_submodule(name).weight.detach(), spec)
            for name in names
        },
        quantizer,
    )
    return model


def rate_of(groups, parameter):
    return next(
        group["lr"] for group in groups if any(each is parameter for each in group["params"])
    )


def test_rates_are_in_steps_of_each_layers_grid():
    small, large = student(), student(10.0)
    groups = [parameter_groups(model, settings()) for model in (small, large)]
    for name, module in fake_quant_modules(small).items():
        other = fake_quant_modules(large)[name]
        assert rate_of(groups[0], module.weight) == pytest.approx(
            grid_rate(SPEC) * grid_step(module)
        )
        assert rate_of(groups[1], other.weight) == pytest.approx(
            10 * rate_of(groups[0], module.weight), rel=1e-2
        )
        # The outermost of four codes is up to two steps from the middle: it moves as far as a
        # weight.
        assert rate_of(groups[0], module.quantizer.scale) * 2 == pytest.approx(
            rate_of(groups[0], module.weight)
        )
        assert rate_of(groups[0], module.quantizer.zero) == grid_rate(SPEC)


def test_every_trained_parameter_is_in_one_group():
    model = student()
    model.get_input_embeddings().requires_grad_(False)
    groups = parameter_groups(model, settings())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    )
    scales = {
        id(parameter)
        for group in groups
        if group["kind"] == SCALES
        for parameter in group["params"]
    }
    assert scales == {
        id(parameter)
        for module in fake_quant_modules(model).values()
        for parameter in module.quantizer.parameters()
    }
    weights = [group["lr"] for group in groups if group["kind"] != SCALES]
    assert weights[-1] == pytest.approx(sum(weights[:-1]) / len(weights[:-1])), (
        "norms move like the mean of the layers"
    )


def test_absolute_rates_replace_those_of_the_grid():
    groups = parameter_groups(student(), settings(lr_weights=1e-3, lr_scales=1e-5))
    assert {(group["kind"], group["lr"]) for group in groups} == {("weights", 1e-3), (SCALES, 1e-5)}


def test_quantizers_without_scales_of_their_own_have_a_grid_too():
    groups = parameter_groups(
        student(quantizer="absmean", spec=QuantSpec("ternary", 32)), settings()
    )
    assert {group["kind"] for group in groups} == {"weights"}
    assert all(group["lr"] > 0 for group in groups)


def test_a_model_without_quantized_layers_needs_a_rate():
    with pytest.raises(LlmqError, match="give lr_weights"):
        parameter_groups(make_model(), settings())
    assert {group["lr"] for group in parameter_groups(make_model(), settings(lr_weights=1e-4))} == {
        1e-4
    }
