"""Learning rates in steps of each layer's own grid.

An optimizer like Adam moves every weight by about its learning rate, whatever the gradient's size.
Whether that is much depends on the distance between two levels, which differs between models,
layers and bit widths by factors of ten. So rates are given in steps of the grid, for weights,
scales and zero points alike: a scale may move its outermost code as far as a weight may move.
Block-wise tuning counts in the same way. The README of `llmq/qat` has what was measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.qat.settings import QATSettings
from llmq.qat.weights import FakeQuantLinear, fake_quant_modules

SCALES = "scales"  # marks groups of scales and zero points, which stop moving before the weights do


def grid_rate(spec: QuantSpec) -> float:
    """Peak learning rate of the weights in steps of their grid. Those of 4 and 2 bits and ternary
    are measured (README); the others, half-integer levels among them, stand beside them, and
    codes between 4 and 8 bits take that of 8."""
    rates = {
        "int8": 1e-3,
        "int4": 2e-3,
        "int3": 1.5e-3,
        "int2": 4e-3,
        "int2h": 4e-3,
        "ternary": 2e-3,
    }
    return rates.get(spec.code, rates["int8"])


@torch.no_grad()
def grid_step(module: FakeQuantLinear) -> float:
    """The mean distance between two levels of a layer's weight."""
    return float(module.quantizer.stored(module.weight)[0].abs().mean())


def parameter_groups(model: nn.Module, settings: QATSettings) -> list[dict[str, Any]]:
    """Everything that is trained, as groups for an optimizer, each with its peak "lr" and a "kind".
    What belongs to no quantized layer moves like the mean of them.

    `settings.lr_weights` and `settings.lr_scales` are absolute and replace the rates of this
    module. Raises `LlmqError` for a model without quantized layers when there is no lr_weights."""
    groups: list[dict[str, Any]] = []

    def add(kind: str, absolute: float | None, relative: float, *parameters: Tensor | None) -> None:
        trained = [
            parameter
            for parameter in parameters
            if parameter is not None and parameter.requires_grad
        ]
        if trained:
            groups.append(
                {"params": trained, "lr": relative if absolute is None else absolute, "kind": kind}
            )

    for module in fake_quant_modules(model).values():
        spec = module.quantizer.spec
        rate, step = grid_rate(spec), grid_step(module)
        add("weights", settings.lr_weights, rate * step, module.weight)
        add(
            SCALES,
            settings.lr_scales,
            rate * step / (spec.levels.levels / 2),
            module.quantizer.scale,
        )
        add(SCALES, settings.lr_scales, rate, module.quantizer.zero)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    rates = [group["lr"] for group in groups if group["kind"] == "weights"]
    if not rates and settings.lr_weights is None:
        raise LlmqError(
            "this model has no quantized layer to take a learning rate from; give lr_weights"
        )
    add(
        "weights",
        settings.lr_weights,
        sum(rates) / max(1, len(rates)),
        *(parameter for parameter in model.parameters() if id(parameter) not in grouped),
    )
    return groups
