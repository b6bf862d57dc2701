"""Which code multiplies with a packed weight.

A backend is one frozen record (`backend.Backend`), which stands beside its code: what it was built
for (`capability.Takes`), why it may not run here, how it prepares a weight once, how it multiplies.
It is refused whatever it does not declare, and checked against `reference`, which takes everything.
The first in `registry.BACKENDS` that accepts a weight is used; `LLMQ_BACKEND=name` asks for one by
name, and then its refusal is an error, never a silent fallback.

A backend may keep a weight in a layout of its own. That layout then replaces the canonical words
(one copy is resident) and `restore` gives the canonical words back, for saving.

Compilers and autograd see one operator, `llmq::linear`, whichever backend is behind it: tensors in
a list, their meaning in a string. `torch.compile` puts it into the graph as a whole and asks its
fake implementation for shapes; autograd gets the gradient with respect to x as the product with the
dequantized weight, which is what an adapter on a quantized base needs. (With INT8 activations that
is the straight-through gradient.) Outside of both, the backend is called directly and none of this
costs anything."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmq_kernels.core import restricted
from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.codes import Code
from llmq_kernels.core.errors import KernelDied, SettingError
from llmq_kernels.core.packing import packed_width
from llmq_kernels.core.registry import BACKENDS, backend_named
from llmq_kernels.core.weight import PackedWeight

_TENSORS = tuple(
    field.name for field in fields(PackedWeight) if "Tensor" in str(field.type)
)  # what travels as tensors; the rest travels as text


def select_backend(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend for activations of `dtype` on `device`. Raises `SettingError` when `LLMQ_BACKEND`
    names one that is unknown or refuses the weight, or no backend takes it."""
    restricted.adapt()
    asked = os.environ.get("LLMQ_BACKEND")
    if not asked:
        reason: str | None = None
        for backend in BACKENDS:
            reason = _refusal(backend, weight, dtype, device)
            if reason is None:
                return backend
        raise SettingError(f"no backend takes this weight, and {backend.name} neither: {reason}")
    chosen = backend_named(asked)
    if reason := _refusal(chosen, weight, dtype, device):
        raise SettingError(
            f"LLMQ_BACKEND={asked} cannot take this weight: {reason}. Unset LLMQ_BACKEND to let "
            "llmq choose"
        )
    return chosen


def _refusal(
    backend: Backend, weight: PackedWeight, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a backend does not multiply here, or None: what it was built for, and in a process that
    may not run everything, what was found when it was tried."""
    tried = restricted.verdict(backend.name) if device.type == "cpu" else None
    return tried or backend.refusal(weight, dtype, device)


class PreparedWeight:
    """A weight bound to the backend that will multiply with it.

    tensors: everything that a product reads. layout: what they are, as text; both together are the
    arguments of `llmq::linear`."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> None:
        self._bind(weight, dtype, device)

    def _bind(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> None:
        self.backend = select_backend(weight, dtype, device)
        self.dtype, self.device = dtype, device
        self.state = self.backend.prepare(weight, dtype)
        self.weight = (
            replace(weight, packed=self.state["packed"]) if "packed" in self.state else weight
        )
        own = {name: getattr(self.weight, name) for name in _TENSORS}
        named = {f"weight.{name}": tensor for name, tensor in own.items() if tensor is not None}
        named |= {
            f"state.{name}": tensor for name, tensor in self.state.items() if name != "packed"
        }
        self.tensors = list(named.values())
        meaning = {
            "code": asdict(weight.code),
            "group_size": weight.group_size,
            "shape": weight.shape,
            "activations": weight.activations,
        }
        self.layout = json.dumps(
            {
                "backend": self.backend.name,
                "replaced": "packed" in self.state,
                **meaning,
                "names": list(named),
            }
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias` for x `[..., K]` of the dtype and on the device this was prepared for;
        returns `[..., N]` in x's dtype."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.llmq.linear(x, self.tensors, self.layout, bias)
        try:
            return _product(self.backend, x, self.weight, self.state, bias)
        except KernelDied:  # its form is not offered any more
            self._bind(_canonical(self.backend, self.weight, self.state), self.dtype, self.device)
            return self.linear(x, bias)

    def canonical_packed(self) -> Tensor:
        """The canonical words, whatever the backend made of them."""
        return _canonical(self.backend, self.weight, self.state).packed

    @property
    def shows_rows(self) -> bool:
        """Whether single rows can be read from the backend's own layout."""
        return "packed" not in self.state or self.backend.rows is not None

    def packed_rows(self, index: Tensor) -> Tensor:
        """The canonical words of the rows in index, int64 `[n]`, where the layout `shows_rows`."""
        if torch.compiler.is_compiling():
            return torch.ops.llmq.rows(index, self.tensors, self.layout)
        return _rows(self.backend, self.weight, self.state, index)


def _rows(backend: Backend, weight: PackedWeight, state: State, index: Tensor) -> Tensor:
    if "packed" not in state:
        return weight.packed[index]
    assert backend.rows is not None
    return backend.rows(weight, state, index)


def _canonical(backend: Backend, weight: PackedWeight, state: State) -> PackedWeight:
    """The weight with the canonical words."""
    return replace(weight, packed=backend.restore(weight, state)) if "packed" in state else weight


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` in one call, for tests and experiments; modules keep the prepared weight."""
    return PreparedWeight(weight, x.dtype, x.device).linear(x, bias)


def _product(
    backend: Backend, x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if bias is not None and backend.bias_linear is not None:
        out = backend.bias_linear(flat, weight, state, bias)
    else:
        out = backend.linear(flat, weight, state)
        if bias is not None:
            out.add_(bias.to(out.dtype))
    return out.view(*x.shape[:-1], weight.shape[0])


# --- one operator for compilers and autograd ------------------------------------------------------


@cache
def _decoded(layout: str) -> dict[str, Any]:
    return json.loads(layout)


def _rebuild(tensors: list[Tensor], layout: str) -> tuple[Backend, PackedWeight, State]:
    meaning = _decoded(layout)
    named = dict(zip(meaning["names"], tensors, strict=True))
    own: dict[str, Any] = {name: named.get(f"weight.{name}") for name in _TENSORS}
    weight = PackedWeight(
        **own,
        code=Code(**meaning["code"]),
        group_size=meaning["group_size"],
        shape=tuple(meaning["shape"]),
        activations=meaning["activations"],
    )
    state = {
        name.removeprefix("state."): tensor
        for name, tensor in named.items()
        if name.startswith("state.")
    }
    if meaning["replaced"]:
        state["packed"] = weight.packed
    return backend_named(meaning["backend"]), weight, state


@torch.library.custom_op("llmq::linear", mutates_args=())
def _linear_op(x: Tensor, tensors: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    backend, weight, state = _rebuild(tensors, layout)
    try:
        return _product(backend, x, weight, state, bias)
    except KernelDied:
        return linear(x.detach(), _canonical(backend, weight, state), bias)


@_linear_op.register_fake
def _(x: Tensor, tensors: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], _decoded(layout)["shape"][0])


@torch.library.custom_op("llmq::rows", mutates_args=())
def _rows_op(index: Tensor, tensors: list[Tensor], layout: str) -> Tensor:
    return _rows(*_rebuild(tensors, layout), index)


@_rows_op.register_fake
def _(index: Tensor, tensors: list[Tensor], layout: str) -> Tensor:
    decoded = _decoded(layout)
    width = packed_width(decoded["shape"][1], decoded["code"]["bits"])
    return index.new_empty(len(index), width, dtype=torch.int32)


@torch.library.custom_op("llmq::linear_input_gradient", mutates_args=())
def _gradient_op(gradient: Tensor, tensors: list[Tensor], layout: str) -> Tensor:
    backend, weight, state = _rebuild(tensors, layout)
    if backend.dequantize is not None:
        values = backend.dequantize(weight, state, gradient.dtype)
    else:
        values = _canonical(backend, weight, state).dequantize().to(gradient.dtype)
    return gradient @ values


@_gradient_op.register_fake
def _(gradient: Tensor, tensors: list[Tensor], layout: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], _decoded(layout)["shape"][1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, ctx.layout, bias = inputs
    ctx.bias_dtype = None if bias is None or not bias.requires_grad else bias.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None, Tensor | None]:
    tensors = list(ctx.saved_tensors)
    bias = None if ctx.bias_dtype is None else gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return (
        torch.ops.llmq.linear_input_gradient(gradient.contiguous(), tensors, ctx.layout),
        [None] * len(tensors),
        None,
        bias,
    )


torch.library.register_autograd("llmq::linear", _backward, setup_context=_setup_context)
