"""The BitNet format of transformers: ternary codes with one scale per tensor, and activations of 8
bits per token.

    weight        uint8 [N / 4, K]   codes 0, 1, 2; with R = N / 4, row r holds the rows r, r + R,
                  r + 2R, r + 3R of the weight at bits 0, 2, 4, 6
    weight_scale  float32 [1]        what the product is divided by ("bitlinear") or multiplied with
                  ("autobitlinear")

llmq writes "bitlinear" and reads both; why, and what the scale loses, stands in README.md."""

from __future__ import annotations

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
_SHIFTS = (0, 2, 4, 6)


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
        stored = stored.float().view(1, 1)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (shape[0] // 4, shape[1]):
            raise LlmqError(
                f"{name}.weight: expected uint8 of shape {[shape[0] // 4, shape[1]]}, got "
                f"{packed.dtype} of shape {list(packed.shape)}; the checkpoint is damaged"
            )
        codes = torch.cat([packed >> shift & 3 for shift in _SHIFTS])
        scale = 1 / stored if _divides(config) else stored
        return QuantizedTensor.from_codes(codes, scale, None, _SPEC)

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
        if mode == "online":
            raise LlmqError(
                "BitNet checkpoint with online quantization: its weights are not quantized yet; "
                "load it with transformers, or take the packed (offline) one"
            )
        if mode != "offline":
            raise wrong("quantization_config: quantization_mode", mode, "'offline' or 'online'")
        linear_class = settings.get("linear_class", _DIVIDING)
        if linear_class not in _LINEAR_CLASSES:
            raise wrong(
                "quantization_config: linear_class",
                linear_class,
                "'bitlinear' (the scale divides) or 'autobitlinear' (it multiplies)",
            )
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


BITNET = BitNet()
