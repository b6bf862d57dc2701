"""Learning rates follow the grid: a model with weights ten times as large learns ten times as fast,
and in relation to its grid the same."""

import pytest
import torch
from conftest import make_model

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.qat.pace import HASTE, grid_rate
from llmq.qat.rates import SCALES, grid_step, parameter_groups
from llmq.qat.weights import fake_quant_modules, prepare

SPEC = QuantSpec("int2", 32, symmetric=False)


def student(factor=1.0, quantizer="lsq", spec=SPEC, **options):
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
        **options,
    )
    return model


def rate_of(groups, parameter):
    return next(
        group["lr"] for group in groups if any(each is parameter for each in group["params"])
    )


def test_rates_are_in_steps_of_each_layers_grid():
    small, large = student(), student(10.0)
    groups = [parameter_groups(model) for model in (small, large)]
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


def test_short_runs_go_faster():
    model = student()
    for slow, fast in zip(parameter_groups(model), parameter_groups(model, 10), strict=True):
        assert fast["lr"] == pytest.approx(slow["lr"] * HASTE)


def test_every_trained_parameter_is_in_one_group():
    model = student()
    model.get_input_embeddings().requires_grad_(False)
    groups = parameter_groups(model)
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
    assert weights[-1] == pytest.approx(sum(weights[:-1]) / len(weights[:-1]) / 2), (
        "norms move half as fast as the layers"
    )


def test_absolute_rates_replace_those_of_the_grid():
    groups = parameter_groups(student(), lr_weights=1e-3, lr_scales=1e-5)
    assert {(group["kind"], group["lr"]) for group in groups} == {("weights", 1e-3), (SCALES, 1e-5)}


def test_quantizers_without_scales_of_their_own_have_a_grid_too():
    groups = parameter_groups(student(quantizer="absmean", spec=QuantSpec("ternary", 32)))
    assert {group["kind"] for group in groups} == {"weights"}
    assert all(group["lr"] > 0 for group in groups)


def test_a_model_without_quantized_layers_needs_a_rate():
    with pytest.raises(LlmqError, match="give lr_weights"):
        parameter_groups(make_model())
    assert {group["lr"] for group in parameter_groups(make_model(), lr_weights=1e-4)} == {1e-4}


def test_a_low_rank_change_moves_the_weight_as_a_weight_moves():
    """An update of Adam moves each entry by its rate, with the sign of the gradient."""
    model, other = student(), student(lora_rank=16)
    groups = parameter_groups(other)
    for name, module in fake_quant_modules(other).items():
        rate = rate_of(parameter_groups(model), fake_quant_modules(model)[name].weight)
        lora = module.lora
        signs = torch.where(torch.rand_like(lora.up) < 0.5, -1.0, 1.0)
        moved = (rate_of(groups, lora.up) * signs) @ lora.down.detach()
        assert moved.square().mean().sqrt() == pytest.approx(rate, rel=0.1)
        size = lora.down.detach().square().mean().sqrt()
        assert rate_of(groups, lora.down) == pytest.approx(float(size) * grid_rate(SPEC))
    trained = {id(each) for group in groups for each in group["params"]}
    assert trained == {id(each) for each in other.parameters() if each.requires_grad}
    assert not other.get_input_embeddings().weight.requires_grad
