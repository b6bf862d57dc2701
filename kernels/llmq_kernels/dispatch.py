"""Which code multiplies with a packed weight.

A backend is one frozen record: what it accepts, how it prepares a weight once, how it multiplies. Every backend is checked against `reference`. The first record in
`BACKENDS` that accepts a weight is used; `LLMQ_BACKEND=name` asks for one by name, and then its refusal is an error, never a silent fallback.

A backend may keep a weight in a layout of its own. That layout then replaces the canonical words (one copy is resident) and `restore` gives the canonical words back, for saving.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq_kernels import cpu, reference
from llmq_kernels.weight import PackedWeight

State = dict[str, Tensor]


@dataclass(frozen=True)
class Backend:
    """refusal(weight, dtype, device): why this backend cannot take the weight, or None when it can. prepare(weight, dtype): tensors in the backend's own layout; when
    it returns a tensor named `packed`, that replaces the canonical words. linear(x, weight, state): `x @ W.T` in x's dtype for x `[M, K]`. restore(weight, state): canonical words."""

    name: str
    refusal: Callable[[PackedWeight, torch.dtype, torch.device], str | None]
    prepare: Callable[[PackedWeight, torch.dtype], State]
    linear: Callable[[Tensor, PackedWeight, State], Tensor]
    restore: Callable[[PackedWeight, State], Tensor]


def _reference_linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    if weight.activations == "int8-token":
        return reference.matmul(reference.fake_quantize_tokens(x), weight.dequantize()).to(x.dtype)
    if weight.activations == "int8-static":
        assert weight.input_range is not None
        return reference.matmul(reference.fake_quantize_static(x, weight.input_range), weight.dequantize()).to(x.dtype)
    return reference.matmul(x, weight.dequantize())


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu-int4", cpu.int4_refusal, cpu.int4_prepare, cpu.int4_linear, cpu.int4_restore),
    Backend("cpu-int8", cpu.int8_refusal, cpu.int8_prepare, cpu.int8_linear, cpu.int8_restore),
    Backend("cpu-w8a8", cpu.w8a8_refusal, cpu.w8a8_prepare, cpu.w8a8_linear, cpu.w8a8_restore),
    Backend("reference", lambda weight, dtype, device: None, lambda weight, dtype: {}, _reference_linear, lambda weight, state: weight.packed),
)


def select_backend(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend for activations of `dtype` on `device`. Raises `ValueError` when `LLMQ_BACKEND` names one that is unknown or refuses the weight."""
    asked = os.environ.get("LLMQ_BACKEND")
    if not asked:
        return next(backend for backend in BACKENDS if backend.refusal(weight, dtype, device) is None)
    chosen = next((backend for backend in BACKENDS if backend.name == asked), None)
    if chosen is None:
        raise ValueError(f"LLMQ_BACKEND={asked}: no such backend; choose one of {', '.join(backend.name for backend in BACKENDS)}")
    if reason := chosen.refusal(weight, dtype, device):
        raise ValueError(f"LLMQ_BACKEND={asked} cannot take this weight: {reason}. Unset LLMQ_BACKEND to let llmq choose")
    return chosen


class PreparedWeight:
    """A weight bound to the backend that will multiply with it."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> None:
        self.backend = select_backend(weight, dtype, device)
        self.dtype, self.device = dtype, device
        self.state = self.backend.prepare(weight, dtype)
        self.weight = replace(weight, packed=self.state["packed"]) if "packed" in self.state else weight

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias` for x `[..., K]` of the dtype and on the device this was prepared for; returns `[..., N]` in x's dtype."""
        flat = x.reshape(-1, x.shape[-1])
        out = self.backend.linear(flat, self.weight, self.state)
        if bias is not None:
            out = out + bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.weight.shape[0])

    def canonical_packed(self) -> Tensor:
        """The canonical words, whatever the backend made of them."""
        return self.backend.restore(self.weight, self.state) if "packed" in self.state else self.weight.packed


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` in one call, for tests and experiments; modules keep the prepared weight."""
    return PreparedWeight(weight, x.dtype, x.device).linear(x, bias)
