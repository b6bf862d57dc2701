"""Mixed precision with loss scaling: float32 masters, float16 arithmetic, gradients that neither
vanish nor overflow. torch's own scaler on a CPU; on a GPU the Trainer does the same."""

import pytest
import torch
from conftest import make_model

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import linear_weight, quantizable_layers
from llmq.models.source import meta_model
from llmq.qat.losses import LossWeights
from llmq.qat.student import Student
from llmq.qat.weights import WeightQuantizer, prepare

IDS = torch.arange(2, 66).view(2, 32)


def student(spec: str, quantizer: str, activations: str) -> Student:
    model, teacher = make_model(), make_model()
    names = [found.name for found in quantizable_layers(meta_model(model.config))]
    start = {
        name: QuantizedTensor.quantize(
            linear_weight(model.get_submodule(name)).detach().float(), QuantSpec.parse(spec)
        )
        for name in names
    }
    prepare(model, start, quantizer, activations)
    return Student(model, teacher, LossWeights())


def gradients(module: Student, dtype: torch.dtype | None, scale: float) -> dict[str, torch.Tensor]:
    """Unscaled, by name."""
    module.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = module(IDS)["loss"]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("spec", "quantizer", "activations"),
    [
        ("w4g32", "lsq", "none"),
        ("w2g32-asym", "lsq", "int8-token"),
        ("ternary-g32", "absmean", "none"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_those_of_float32(spec, quantizer, activations, dtype):
    module = student(spec, quantizer, activations)
    exact, scaled = gradients(module, None, 1.0), gradients(module, dtype, 2.0**10)
    assert scaled.keys() == exact.keys()
    assert all(gradient.dtype == torch.float32 for gradient in scaled.values()), "masters"
    assert any(isinstance(part, WeightQuantizer) for part in module.modules())
    # One rounding of 2^-11 or 2^-8 in each of some tens of operations; codes that sit on a boundary
    # of a rounded activation make the rest: 0.03 and 0.04 at most when this was written.
    limit = {torch.float16: 0.06, torch.bfloat16: 0.1}[dtype]
    for name, gradient in exact.items():
        assert (scaled[name] - gradient).norm() <= limit * gradient.norm() + 1e-7, name


def test_a_scale_that_overflows_is_lowered_and_its_step_left_out():
    module = student("w4g32", "lsq", "none")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer, scaler = (
        torch.optim.SGD(module.parameters(), lr=1e-3),
        torch.amp.GradScaler("cpu", init_scale=2.0**40),
    )
    with torch.autocast("cpu", torch.float16):
        loss = module(IDS)["loss"]
    assert torch.isfinite(loss)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in module.named_parameters()
    )
