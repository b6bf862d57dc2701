"""The BitNet format of transformers: ternary codes with one scale per tensor, and activations of 8
bits per token.

    weight        uint8 [N / 4, K]   codes 0, 1, 2; with R = N / 4, row r holds the rows r, r + R,
                  r + 2R, r + 3R of the weight at bits 0, 2, 4, 6
    weight_scale  float32 [1]        what the product is divided by ("bitlinear") or multiplied with
                  ("autobitlinear")

A third form holds weights in full precision, which "autobitlinear" rounds whenever it computes
("online"); llmq rounds them once. llmq writes "bitlinear" and reads all three; why, and what the
scale loses, stands in README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.base import OWN_METHOD, Format, Settings, Specs
from llmq.formats.setting_types import wrong
from llmq.grid.spec import PER_TENSOR, ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor

_SPEC = QuantSpec("ternary", PER_TENSOR)
_TOKENS = ActSpec("int8-token")
_DIVIDING = "bitlinear"
_LINEAR_CLASSES = (_DIVIDING, "autobitlinear")
_ONLINE = "online"
_SHIFTS = (0, 2, 4, 6)
_SMALLEST = 1e-5  # mean magnitude that transformers divides by
_DTYPE_NAMES: dict[torch.dtype, Any] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


class BitNet(Format):
    """Implies activations of 8 bits per token."""

    name = "bitnet"
    marker = "weight_scale"
    suffixes = frozenset({"weight", "weight_scale"})
    quant_method = "bitnet"
    activations = _TOKENS
    has_order = False

    def refusal(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        if spec != _SPEC:
            return f"it holds ternary codes with one float16 scale per tensor only, not {spec}"
        if shape[0] % 4:
            return f"it needs N divisible by 4, not {shape[0]}"
        return None

    def refusal_of_activations(self, activations: ActSpec) -> str | None:
        if activations == _TOKENS:
            return None
        return (
            "it implies activations of 8 bits per token (--activations int8-token), not "
            f"{activations}"
        )

    def is_first_choice(self, specs: Specs) -> bool:
        return True

    def layer_bytes(
        self, spec: QuantSpec, shape: tuple[int, int], *, act_order: bool = False
    ) -> int:
        """Four codes a byte and a float32 scale."""
        return shape[0] * shape[1] // 4 + 4

    def write(self, qtensor: QuantizedTensor) -> dict[str, Tensor]:
        quarters = qtensor.codes().view(4, -1, qtensor.shape[1])  # [4, N / 4, K]
        packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        return {"weight": packed, "weight_scale": 1 / qtensor.scale.float().view(1)}

    def read(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> QuantizedTensor:
        if missing := {"weight", "weight_scale"} - tensors.keys():
            raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
        packed, stored = tensors["weight"], tensors["weight_scale"]
        if stored.numel() != 1 or not stored.is_floating_point():
            raise LlmqError(
                f"{name}.weight_scale: expected one real number, got {stored.dtype} of shape "
                f"{list(stored.shape)}; the checkpoint is damaged"
            )
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (shape[0] // 4, shape[1]):
            raise LlmqError(
                f"{name}.weight: expected uint8 of shape {[shape[0] // 4, shape[1]]}, got "
                f"{packed.dtype} of shape {list(packed.shape)}; the checkpoint is damaged"
            )
        codes = torch.cat([packed >> shift & 3 for shift in _SHIFTS])
        scale, spec = _read_scale(stored.float().view(1, 1), _divides(config))
        return QuantizedTensor.from_codes(codes, scale, None, spec)

    def is_online(self, config: Settings) -> bool:
        return config.get("quantization_mode") == _ONLINE

    def from_weight(self, weight: Tensor) -> QuantizedTensor:
        """By transformers' rule, in float32 and then in the dtype of the weight, whatever it is."""
        steps = 1 / weight.float().abs().mean().clamp(min=_SMALLEST)
        codes = (weight.float() * steps).round().clamp(-1, 1) + 1
        spec = replace(_SPEC, scale_dtype=_DTYPE_NAMES[weight.dtype])
        return QuantizedTensor.from_codes(codes.to(torch.uint8), (1 / steps).view(1, 1), None, spec)

    def remarks(self, config: Settings, stored: Mapping[str, str]) -> list[str]:
        if not self.is_online(config):
            return []
        return [
            "weights in full precision are rounded to ternary codes, as the config says (online)"
        ]

    def bias(self, bias: Tensor, tensors: dict[str, Tensor], config: Settings) -> Tensor:
        """transformers multiplies the whole output of an "autobitlinear" layer, bias included, with
        the scale; that of a "bitlinear" one before the bias is added."""
        if _divides(config):
            return bias
        return (bias.float() * tensors["weight_scale"].float()).to(bias.dtype)

    def stated_spec(self, name: str, config: Settings) -> QuantSpec | None:
        return _SPEC

    def write_config(self, specs: Specs, *, act_order: bool = False) -> Settings:
        kept = ["lm_head", *(name for name, spec in specs.items() if spec is None)]
        return {
            "quant_method": self.quant_method,
            "linear_class": _DIVIDING,
            "quantization_mode": "offline",
            "modules_to_not_convert": kept,
        }

    def read_config(self, settings: Settings) -> Settings:
        mode = settings.get("quantization_mode", "offline")
        if mode not in ("offline", _ONLINE):
            raise wrong("quantization_config: quantization_mode", mode, "'offline' or 'online'")
        linear_class = settings.get("linear_class", _DIVIDING)
        if linear_class not in _LINEAR_CLASSES:
            raise wrong(
                "quantization_config: linear_class",
                linear_class,
                "'bitlinear' (the scale divides) or 'autobitlinear' (it multiplies)",
            )
        if mode == _ONLINE and linear_class == _DIVIDING:
            raise wrong("quantization_config: linear_class", linear_class, "'autobitlinear' online")
        if settings.get("use_rms_norm"):
            raise LlmqError(
                "BitNet checkpoint with a norm inside every layer (use_rms_norm): llmq has no such "
                "layer; load it with transformers"
            )
        return {
            **settings,
            "quant_method": OWN_METHOD,
            "format": self.name,
            "linear_class": linear_class,
            "activations": {"kind": _TOKENS.kind},
        }


def _divides(config: Settings) -> bool:
    """Whether the stored scale divides."""
    return bool(config.get("linear_class", _DIVIDING) == _DIVIDING)


def _read_scale(stored: Tensor, divides: bool) -> tuple[Tensor, QuantSpec]:
    """The scale `[1, 1]` of a layer, and its spec: float16 where that gives the stored number back,
    as it does for what llmq writes, else float32."""
    scale = 1 / stored if divides else stored
    short = scale.half()
    again = 1 / short.float() if divides else short.float()
    if torch.equal(again, stored):
        return short, _SPEC
    return scale, replace(_SPEC, scale_dtype="float32")


BITNET = BitNet()
