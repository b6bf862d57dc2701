"""The BitNet format of transformers: ternary codes with one scale per tensor, and activations of 8
bits per token.

    weight        uint8 [N / 4, K]   codes 0, 1, 2; with R = N / 4, row r holds the rows r, r + R, r
                  + 2R, r + 3R of the weight at bits 0, 2, 4, 6
    weight_scale  float32 [1]        what the product is divided by ("bitlinear") or multiplied with
                  ("autobitlinear")

llmq writes "bitlinear", whose folders survive being saved again, and reads both. Dividing by 1 / s
instead of multiplying with s is off by one float32 rounding, which the float16 that llmq keeps
scales in does not see: the scale that is read is the scale that was written, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import Format, Specs
from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor

_SPEC = QuantSpec("ternary", PER_TENSOR)


def _refusal(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    if spec != _SPEC:
        return f"it holds ternary codes with one float16 scale per tensor only, not {spec}"
    if shape[0] % 4:
        return f"it needs N divisible by 4, not {shape[0]}"
    return None


def _write(qtensor: QuantizedTensor) -> dict[str, Tensor]:
    quarters = qtensor.codes().view(4, -1, qtensor.shape[1])  # [4, N / 4, K]
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return {"weight": packed, "weight_scale": 1 / qtensor.scale.float().view(1)}


def _read(
    name: str, tensors: dict[str, Tensor], config: dict[str, Any], shape: tuple[int, int]
) -> QuantizedTensor:
    if missing := {"weight", "weight_scale"} - tensors.keys():
        raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
    packed, stored = tensors["weight"], tensors["weight_scale"]
    if stored.numel() != 1 or not stored.is_floating_point():
        raise LlmqError(
            f"{name}.weight_scale: expected one real number, got {stored.dtype} of shape "
            f"{list(stored.shape)}; the checkpoint is damaged"
        )
    stored = stored.float().view(1, 1)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (shape[0] // 4, shape[1]):
        raise LlmqError(
            f"{name}.weight: expected uint8 of shape {[shape[0] // 4, shape[1]]}, got "
            f"{packed.dtype} of shape {list(packed.shape)}; the checkpoint is damaged"
        )
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    scale = 1 / stored if config.get("linear_class", "bitlinear") == "bitlinear" else stored
    return QuantizedTensor.from_codes(codes, scale, None, _SPEC)


def _bias(bias: Tensor, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """transformers multiplies the whole output of an "autobitlinear" layer, bias included, with the
    scale; that of a "bitlinear" one before the bias is added."""
    if config.get("linear_class", "bitlinear") == "bitlinear":
        return bias
    return (bias.float() * tensors["weight_scale"].float()).to(bias.dtype)


def _config(specs: Specs) -> dict[str, Any]:
    kept = ["lm_head", *(name for name, spec in specs.items() if spec is None)]
    return {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": kept,
    }


_SUFFIXES = frozenset({"weight", "weight_scale"})
BITNET = Format("bitnet", "weight_scale", _refusal, _write, _read, _config, _SUFFIXES, _bias)
"""Implies INT8 activations per token, which `choose_format` checks."""
