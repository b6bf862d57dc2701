"""Learning rates in steps of each layer's own grid.

An optimizer like Adam moves every weight by about its learning rate, whatever the gradient's size.
Whether that is much depends on the distance between two levels, which differs between models,
layers and bit widths by factors of ten. So rates are given in steps of the grid, for weights,
scales and zero points alike: a scale may move its outermost code as far as a weight may move.
Block-wise tuning counts in the same way.

What all blocks change adds up on the way through the model, so a deep model takes smaller steps.
The README of `llmq/qat` has what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.qat.weights import FakeQuantLinear, fake_quant_modules

SCALES = "scales"  # marks groups of scales and zero points, which stop moving before the weights do
DEPTH = 6  # blocks of the models that the rates were measured on, at most
_BLOCK = re.compile(r"(.*?\.\d+)\.")


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


def depth_factor(layers: Iterable[str]) -> float:
    """What a model with layers of these names takes of the rates of `grid_rate`: the shares of its
    blocks add up to those of `DEPTH` ones."""
    blocks = {found[1] for name in layers if (found := _BLOCK.match(name))}
    return min(1.0, DEPTH / max(1, len(blocks)))


def margin(rate: float, n_steps: int) -> float:
    """How many steps of their grid masters start from the edge of their cells, for a peak rate in
    steps: a share of the way that a weight can go, so that only a direction that lasts flips a
    code (README)."""
    way = rate * n_steps / 2  # under half a cosine
    return min(0.3, max(0.01, 0.3 * way))


@torch.no_grad()
def grid_step(module: FakeQuantLinear) -> float:
    """The mean distance between two levels of a layer's weight."""
    return float(module.quantizer.stored(module.master())[0].abs().mean())


def parameter_groups(
    model: nn.Module, *, lr_weights: float | None = None, lr_scales: float | None = None
) -> list[dict[str, Any]]:
    """Everything that is trained, as groups for an optimizer, each with its peak "lr" and a "kind".
    What belongs to no quantized layer moves like the mean of them. Nothing decays: a scale that did
    would shrink its codes.

    lr_weights, lr_scales: absolute, in the place of this module's rates; a LoRA takes that of the
    weights. Raises `LlmqError` for a model without quantized layers when there is no lr_weights."""
    groups = _Groups()
    modules = fake_quant_modules(model)
    depth = depth_factor(modules)
    rates = []
    for module in modules.values():
        spec = module.quantizer.spec
        rate, step = depth * grid_rate(spec), grid_step(module)
        rates.append(rate * step)
        of_weights = rate * step if lr_weights is None else lr_weights
        groups.add("weights", of_weights, module.weight)
        if module.lora is not None:
            size = float(module.lora.down.detach().square().mean().sqrt())
            groups.add("weights", of_weights, module.lora.up)
            groups.add(
                "weights", rate * size if lr_weights is None else lr_weights, module.lora.down
            )
        of_scales = rate * step / (spec.levels.levels / 2)
        groups.add(SCALES, of_scales if lr_scales is None else lr_scales, module.quantizer.scale)
        groups.add(SCALES, rate if lr_scales is None else lr_scales, module.quantizer.zero)
    if not rates and lr_weights is None:
        raise LlmqError(
            "this model has no quantized layer to take a learning rate from; give lr_weights"
        )
    others = lr_weights if lr_weights is not None else sum(rates) / len(rates)
    groups.add("weights", others, *model.parameters())
    return groups.groups


class _Groups:
    """Groups of an optimizer, with every trained parameter in the first that it is added to."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self._grouped: set[int] = set()

    def add(self, kind: str, rate: float, *parameters: Tensor | None) -> None:
        trained = [
            each
            for each in parameters
            if each is not None and each.requires_grad and id(each) not in self._grouped
        ]
        self._grouped |= {id(each) for each in trained}
        if trained:
            group = {"params": trained, "lr": rate, "weight_decay": 0.0, "kind": kind}
            self.groups.append(group)
