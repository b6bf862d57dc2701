"""A packed weight as the kernels see it: the canonical tensors and what their integers mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.core.codes import Code
from llmq_kernels.core.packing import unpack
from llmq_kernels.core.reference import dequantize_codes

# Kinds of `PackedWeight.activations` that no checkpoint asks for, only whoever runs the model.
RUN_TIME_ACTIVATIONS = ("int8-group", "int8-token-asym")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """`[N, K]` weight. packed: int32 words `[N, packed_width(K, bits)]`. scale: float `[N, G]` or
    `[1, 1]`. zero: uint8, shaped like scale, or None for `code.offset`. g_idx: int32 `[K]`, the
    group of each column, or None for consecutive groups of `group_size` columns. activations:
    "none"; "int8-token" when x is quantized per token before an integer product; "int8-static" when
    it is by the scale and zero point in input_range, float32 `[2]`: both as the checkpoint says.
    "int8-group" when x is quantized per token and group, "int8-token-asym" when it is by a scale
    and zero point per token, as whoever runs the model says: these two are never stored."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    g_idx: Tensor | None
    code: Code
    group_size: int
    shape: tuple[int, int]
    activations: str = "none"
    input_range: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 `[N, K]`."""
        zero = self.code.offset if self.zero is None else self.zero
        return dequantize_codes(
            unpack(self.packed, self.code.bits, self.shape[1]),
            self.scale,
            zero,
            self.group_size,
            self.g_idx,
        )

    def static_shift(self) -> dict[str, Tensor]:
        """With a static range, `{"shift": float32 [N]}`: what outputs lack when codes of x, 0 to
        255, are multiplied as signed bytes 128 lower instead of at their zero point, `scale * (128
        - zero) * sum_k W`. Empty without one."""
        if self.input_range is None:
            return {}
        scale, zero = self.input_range.double()
        return {
            "shift": (
                self.dequantize().sum(1, dtype=torch.float64) * (scale * (128 - zero))
            ).float()
        }
