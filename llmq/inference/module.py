"""The module that takes the place of a linear layer once its weight is quantized."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.weight_view import WeightView, refuse_write
from llmq_kernels.core.compute import at_run_time, default_mode
from llmq_kernels.core.dispatch import PreparedWeight
from llmq_kernels.core.weight import PackedWeight

_KEYS = itertools.count()
_MODULES: WeakValueDictionary[str, QuantLinear] = (
    WeakValueDictionary()
)  # those alive, for `_prepare_in_trace`
# Held while a module changes the form of its weight, which is seldom: for the first of several
# threads that call it, for another dtype or device, for saving. Products need none: they keep to
# the form they found, which is never changed, only replaced.
_CHANGING = threading.RLock()


class QuantLinear(nn.Linear):
    """`y = x @ dequantize(W).T + bias`, computed by the backend that suits the dtype and device of
    x. dtype: what the layer had before it was quantized, which `weight` has (default: torch's).

    A linear layer to whoever asks, such as PEFT, with a `weight` that can be read and not written:
    see `llmq.inference.weight_view`. It is no parameter, and no dense copy of it is kept.

    The packed tensors are buffers, so `state_dict`, `.to(device)` and safetensors treat them as
    weights. Scales keep their stored dtype under `.to(dtype)` and `.half()`: casting them would
    change every weight of the layer. A backend may keep the words in its own layout; then that is
    the only copy, and `qtensor` inverts it.

    Prepared tensors are buffers too, but not saved ones: that counts them as the module's memory
    and tells CUDA graphs that their addresses stay. `torch.compile(fullgraph=True)` works before
    and after the first call. Where a module is traced before it is prepared, it prepares itself and
    the trace starts over; models that are compiled block by block should call `prepare` first, so
    that all blocks look alike to the compiler."""

    packed: Tensor | None
    scale: Tensor
    zero: Tensor | None
    g_idx: Tensor | None
    input_range: Tensor | None
    bias: Tensor | None  # type: ignore[assignment]
    weight_dtype: torch.dtype
    _ready_dtype: torch.dtype | None
    _ready_device: torch.device | None
    _prepared_names: tuple[str, ...]

    # transformers' own initialisation leaves alone what says this of itself
    _is_hf_initialized = True

    def __init__(
        self,
        qtensor: QuantizedTensor,
        bias: Tensor | None = None,
        activations: ActSpec = ActSpec(),
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # that of `nn.Linear` makes a dense weight
        self.out_features, self.in_features = qtensor.shape
        self.spec: QuantSpec = qtensor.spec
        self.activations = activations
        self.compute = default_mode()
        self.is_shared = False
        for name in ("packed", "scale", "zero", "g_idx", "input_range"):
            self.register_buffer(name, getattr(qtensor, name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.weight_dtype = dtype or torch.get_default_dtype()
        self._prepared: PreparedWeight | None = None
        self._forget()
        self._register()

    def _register(self) -> None:
        self._key = str(next(_KEYS))
        _MODULES[self._key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy is a module of its own

    @property
    def weight(self) -> WeightView:  # type: ignore[override]
        """The dequantized weight `[N, K]`, read-only."""
        shape = (self.out_features, self.in_features)
        return WeightView(self._dense_weight, shape, self.weight_dtype, self.scale.device)

    def _dense_weight(self) -> Tensor:
        return self.qtensor().dequantize().to(self.weight_dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            refuse_write()
        super().register_parameter(name, param)

    def qtensor(self) -> QuantizedTensor:
        """The weight in canonical form."""
        with _CHANGING:
            packed = self.packed if self._prepared is None else self._prepared.canonical_packed()
        assert packed is not None
        return QuantizedTensor(
            packed,
            self.scale,
            self.zero,
            self.spec,
            (self.out_features, self.in_features),
            self.g_idx,
            self.input_range,
        )

    def _as_packed(self, dtype: torch.dtype, device: torch.device) -> PackedWeight:
        return at_run_time(
            self.qtensor().as_packed(self.activations.kind), self.compute, dtype, device
        )

    def set_compute(self, mode: str) -> None:
        """Whether activations may be rounded at run time: see `llmq_kernels.core.compute`."""
        with _CHANGING:
            self._release()
            self.compute = mode

    def prepare(self, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Lay the weight out for activations of `dtype` on `device` (default: where the weight is).
        The first forward pass does this by itself."""
        self._prepare(dtype, self.scale.device if device is None else torch.device(device))

    def _prepare(self, dtype: torch.dtype, device: torch.device) -> PreparedWeight:
        with _CHANGING:
            prepared = self._prepared
            if prepared is not None and prepared.dtype == dtype and prepared.device == device:
                return prepared
            self._release()
            words = self.packed
            prepared = PreparedWeight(self._as_packed(dtype, device), dtype, device)
            keeps_words = self.is_shared and not prepared.shows_rows
            self._prepared, self.packed = prepared, words if keeps_words else None
            self._ready_dtype, self._ready_device, self._layout = dtype, device, prepared.layout
            self._prepared_names = tuple(f"prepared_{i}" for i in range(len(prepared.tensors)))
            for name, tensor in zip(self._prepared_names, prepared.tensors, strict=True):
                self.register_buffer(name, tensor, persistent=False)
            return prepared

    def _forget(self) -> None:
        for name in getattr(self, "_prepared_names", ()):
            delattr(self, name)
        self._ready_dtype = self._ready_device = None
        self._layout = ""
        self._prepared_names = ()

    def _release(self) -> None:
        """Go back to the canonical words."""
        if self._prepared is not None:
            self.packed = self._prepared.canonical_packed()
            self._prepared = None
            self._forget()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if self._ready_dtype != x.dtype or self._ready_device != x.device:
                _prepare_in_trace(self._key, x.dtype, x.device)
            return torch.ops.llmq.linear(
                x, [getattr(self, name) for name in self._prepared_names], self._layout, self.bias
            )
        prepared = self._prepared
        if prepared is None or prepared.dtype != x.dtype or prepared.device != x.device:
            prepared = self._prepare(x.dtype, x.device)
        return prepared.linear(x, self.bias)

    def packed_rows(self, index: Tensor) -> Tensor:
        """The canonical words of the rows in index, int64 `[n]`, for embeddings that are this
        layer, too."""
        words, prepared = self.packed, self._prepared
        if words is not None:
            return words[index]
        assert prepared is not None
        return prepared.packed_rows(index)

    @property
    def prepared(self) -> PreparedWeight | None:
        """The weight as its backend has it, another object whenever that changes; None before the
        first forward pass."""
        return self._prepared

    @property
    def backend(self) -> str | None:
        """The backend of the last forward pass, or None before the first."""
        return None if self._prepared is None else self._prepared.backend.name

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        with _CHANGING:
            self._release()
            scale_dtype = self.scale.dtype
            self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
            before, input_range = self.scale, self.input_range
            super()._apply(fn, recurse)
            if self.scale.dtype != scale_dtype:
                self.scale = before.to(self.scale.device)
            if input_range is not None:
                self.input_range = input_range.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.is_shared:
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
            return
        with _CHANGING:
            self._release()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec}, "
            f"backend={self.backend}"
        )


@torch.compiler.assume_constant_result
def _prepare_in_trace(key: str, dtype: torch.dtype, device: torch.device) -> None:
    """Prepare a module while Dynamo traces it, and have the trace start over with the module as it
    is then: what was traced so far stands on guards that no longer hold. By key, since not every
    version of torch takes a module for a constant. Those that were made for the same dtype and
    device are prepared with it, or the trace would start over for each layer of a model."""
    _MODULES[key].prepare(dtype, device)
    for module in list(_MODULES.values()):
        is_alike = module.weight_dtype == dtype and module.scale.device == device
        if is_alike and module.prepared is None:
            module.prepare(dtype, device)
    restart = getattr(torch._dynamo.exc, "UnspecializeRestartAnalysis", None)
    if restart is None:
        raise LlmqError(
            "this version of torch cannot prepare a quantized weight while it traces; call "
            "llmq.inference.module.prepare(model, dtype) before torch.compile"
        )
    raise restart(restart_reason="a quantized weight was laid out for its backend")


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Lay out every quantized weight for activations of `dtype` on the device it is on, before
    compiling or capturing."""
    for module in quantized_modules(model).values():
        module.prepare(dtype)


def swap(
    model: nn.Module, tensors: Mapping[str, QuantizedTensor], activations: ActSpec = ActSpec()
) -> None:
    """Replace the named linear layers by `QuantLinear` modules, in place, keeping their biases."""
    for name, qtensor in tensors.items():
        old = model.get_submodule(name)
        bias, weight = getattr(old, "bias", None), getattr(old, "weight", None)
        model.set_submodule(
            name,
            QuantLinear(
                qtensor,
                bias if isinstance(bias, torch.Tensor) else None,
                activations,
                weight.dtype if isinstance(weight, torch.Tensor) else None,
            ),
        )


def quantized_modules(model: nn.Module) -> dict[str, QuantLinear]:
    """Name -> module of every quantized layer."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }


def backends_in_use(model: nn.Module) -> dict[str, int]:
    """How many quantized layers each backend multiplied in the last forward pass."""
    return dict(
        Counter(module.backend or "not run yet" for module in quantized_modules(model).values())
    )
