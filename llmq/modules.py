"""The module that takes the place of a linear layer once its weight is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.qtensor import QuantizedTensor
from llmq.spec import ActSpec, QuantSpec
from llmq_kernels.dispatch import PreparedWeight


class QuantLinear(nn.Module):
    """`y = x @ dequantize(W).T + bias`, computed by the backend that suits the dtype and device of x.

    The packed tensors are buffers, so `state_dict`, `.to(device)` and safetensors treat them as weights. Scales keep their stored dtype under `.to(dtype)` and `.half()`:
    casting them would change every weight of the layer. A backend may keep the words in its own layout; then that is the only copy, and `qtensor` inverts it.
    """

    packed: Tensor | None
    scale: Tensor
    zero: Tensor | None
    g_idx: Tensor | None
    input_range: Tensor | None
    bias: Tensor | None

    def __init__(self, qtensor: QuantizedTensor, bias: Tensor | None = None, activations: ActSpec = ActSpec()) -> None:
        super().__init__()
        self.out_features, self.in_features = qtensor.shape
        self.spec: QuantSpec = qtensor.spec
        self.activations = activations
        for name in ("packed", "scale", "zero", "g_idx", "input_range"):
            self.register_buffer(name, getattr(qtensor, name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._prepared: PreparedWeight | None = None

    def qtensor(self) -> QuantizedTensor:
        """The weight in canonical form."""
        packed = self.packed if self._prepared is None else self._prepared.canonical_packed()
        assert packed is not None
        return QuantizedTensor(packed, self.scale, self.zero, self.spec, (self.out_features, self.in_features), self.g_idx, self.input_range)

    def _release(self) -> None:
        """Go back to the canonical words."""
        if self._prepared is not None:
            self.packed = self._prepared.canonical_packed()
            self._prepared = None

    def forward(self, x: Tensor) -> Tensor:
        prepared = self._prepared
        if prepared is None or prepared.dtype != x.dtype or prepared.device != x.device:
            self._release()
            prepared = self._prepared = PreparedWeight(self.qtensor().as_packed(self.activations.kind), x.dtype, x.device)
            self.packed = None
        return prepared.linear(x, self.bias)

    @property
    def backend(self) -> str | None:
        """The backend of the last forward pass, or None before the first."""
        return None if self._prepared is None else self._prepared.backend.name

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        self._release()
        scale_dtype = self.scale.dtype
        before, input_range = self.scale, self.input_range
        super()._apply(fn, recurse)
        if self.scale.dtype != scale_dtype:
            self.scale = before.to(self.scale.device)
        if input_range is not None:
            self.input_range = input_range.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._release()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec}, backend={self.backend}"


def swap(model: nn.Module, tensors: Mapping[str, QuantizedTensor], activations: ActSpec = ActSpec()) -> None:
    """Replace the named linear layers by `QuantLinear` modules, in place, keeping their biases."""
    for name, qtensor in tensors.items():
        old = model.get_submodule(name)
        bias = getattr(old, "bias", None)
        model.set_submodule(name, QuantLinear(qtensor, bias if isinstance(bias, torch.Tensor) else None, activations))


def quantized_modules(model: nn.Module) -> dict[str, QuantLinear]:
    """Name -> module of every quantized layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
