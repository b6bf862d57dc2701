"""Experts that are multiplied in one launch on a GPU: whether they are, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmq_kernels.core.dispatch import PreparedWeight
from llmq_kernels.triton.backend import interpreting
from llmq_kernels.triton.grouped import GroupedWeight, refusal

Grouped = dict[str, GroupedWeight]
# By module of experts: what was prepared, and what was made of it. Not in the module, since a copy
# of it has its tensors elsewhere.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[PreparedWeight], Grouped | None]] = (
    WeakKeyDictionary()
)


def may_group(x: Tensor) -> bool:
    """Whether inputs are where there is a kernel for it: on a GPU, or in Triton's interpreter.
    Gradients and compilers want the layers one by one."""
    if not (x.is_cuda or interpreting()):
        return False
    return not (torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()))


def grouped_weights(
    module: nn.Module, layers: Mapping[str, Sequence[nn.Module]], x: Tensor
) -> Grouped | None:
    """The weights of all experts by the name of the layer, or None where they are not packed alike
    for such a launch, or someone listens to single layers. x: what the first layers read."""
    prepared = [_prepared(layer, x) for group in layers.values() for layer in group]
    found = [one for one in prepared if one is not None]
    if len(found) < len(prepared):
        return None
    known = _KNOWN.get(module)
    if known is None or any(a is not b for a, b in zip(known[0], found, strict=True)):
        known = found, _grouped(layers, found)
        _KNOWN[module] = known
    return known[1]


def _prepared(layer: Any, x: Tensor) -> PreparedWeight | None:
    """A quantized layer's weight, laid out for x."""
    if not hasattr(type(layer), "prepared") or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    prepared = layer.prepared
    if prepared is None or prepared.dtype != x.dtype or prepared.device != x.device:
        layer.prepare(x.dtype, x.device)
        prepared = layer.prepared
    assert isinstance(prepared, PreparedWeight)
    return prepared


def _grouped(
    layers: Mapping[str, Sequence[nn.Module]], prepared: Sequence[PreparedWeight]
) -> Grouped | None:
    result: Grouped = {}
    start = 0
    for name, group in layers.items():
        weights = prepared[start : start + len(group)]
        biases: list[Any] = [layer.bias for layer in group]
        if refusal(weights, biases) is not None:
            return None
        result[name] = GroupedWeight(weights, biases)
        start += len(group)
    return result
