"""Learning rates in steps of each layer's own grid.

An optimizer like Adam moves every weight by about its learning rate, whatever the gradient's size.
Whether that is much depends on the distance between two levels, which differs between models,
layers and bit widths by factors of ten. So rates are given in steps of the grid, for weights,
scales and zero points alike: a scale may move its outermost code as far as a weight may move.
Block-wise tuning counts in the same way.

Short runs go faster (`llmq.qat.pace`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.qat.pace import grid_rate
from llmq.qat.weights import FakeQuantLinear, fake_quant_modules, whole

SCALES = "scales"  # marks groups of scales and zero points, which stop moving before the weights do


@torch.no_grad()
def grid_step(module: FakeQuantLinear) -> float:
    """The mean distance between two levels of a layer's weight."""
    return float(module.quantizer.stored(whole(module.master()))[0].abs().mean())


def parameter_groups(
    model: nn.Module,
    n_steps: int | None = None,
    *,
    lr_weights: float | None = None,
    lr_scales: float | None = None,
) -> list[dict[str, Any]]:
    """Everything that is trained, as groups for an optimizer, each with its peak "lr" and a "kind".
    What belongs to no quantized layer moves half as fast as the mean of them. Nothing decays: a
    scale that did would shrink its codes.

    n_steps: updates of the run, None where unknown. lr_weights, lr_scales: absolute, in the place
    of this module's rates; a LoRA takes that of the weights. Raises `LlmqError` for a model without
    quantized layers when there is no lr_weights."""
    groups = _Groups()
    rates = []
    for module in fake_quant_modules(model).values():
        spec = module.quantizer.spec
        rate, step = grid_rate(spec, n_steps), grid_step(module)
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
    others = lr_weights if lr_weights is not None else sum(rates) / len(rates) / 2
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
