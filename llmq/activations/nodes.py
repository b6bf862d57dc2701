"""Quantization of what flows between layers, with straight-through gradients.

Layer inputs: one scale per token from its largest magnitude ("int8-token", LLM-QAT), or one range
per layer, learned from the data as an exponential moving average of its minimum and maximum
("int8-static", Jacob et al., 2018). Static ranges are only observed at first: quantizing with a
range that still moves would chase its own noise. Near the end they are frozen.

A batch is observed once: gradient checkpointing runs a forward pass again inside the backward one.

The switches (`enabled`, `observing`) are plain attributes that the schedule sets from the step
number, so a resumed run sets them again; the ranges are buffers and travel with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.activations.ranges import static_range
from llmq.errors import LlmqError
from llmq.grid.fakequant import straight_through
from llmq_kernels.core.reference import LEVELS, fake_quantize_static, fake_quantize_tokens

EMA = 0.01  # weight of the newest batch in a moving range (Jacob et al., section 3.1)


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """INT8 with one scale per token, for x `[..., K]`, in x's dtype. Nothing is clipped, so the
    gradient is the identity."""
    value = fake_quantize_tokens(x.detach().reshape(-1, x.shape[-1])).view(x.shape).to(x.dtype)
    return straight_through(x, value)


def fake_quantize_ranged(x: Tensor, input_range: Tensor) -> Tensor:
    """INT8 with one scale and zero point for all (float32 `[2]`), in x's dtype. Gradient: the
    identity inside the range, zero outside."""
    scale, zero = input_range
    unclipped = torch.round(x.detach().float() / scale) + zero
    kept = (unclipped >= 0) & (unclipped <= LEVELS)
    return straight_through(x, fake_quantize_static(x.detach(), input_range).to(x.dtype), kept)


def is_recomputing() -> bool:
    """Whether this forward pass is gradient checkpointing's second one: it runs inside a backward
    pass."""
    return torch._C._current_graph_task_id() != -1


class ActivationQuantizer(nn.Module):
    """The node before a layer. kind: "int8-token" or "int8-static". enabled: quantize. observing:
    let the static range follow the data (while training). input_range: a static range to start
    from, float32 `[2]`, or None to start from the data."""

    low: Tensor
    high: Tensor

    def __init__(self, kind: str, input_range: Tensor | None = None) -> None:
        super().__init__()
        if kind not in ("int8-token", "int8-static"):
            raise LlmqError(
                f"unknown activation quantization {kind!r}: expected none, int8-token or "
                "int8-static"
            )
        self.kind = kind
        self.enabled = True
        self.observing = kind == "int8-static"
        if kind == "int8-static":
            scale, zero = (
                torch.full((2,), torch.nan) if input_range is None else input_range.float()
            )
            self.register_buffer("low", (0 - zero) * scale)
            self.register_buffer("high", (LEVELS - zero) * scale)

    @classmethod
    def of(cls, kind: str, input_range: Tensor | None = None) -> ActivationQuantizer | None:
        """The node, or None for "none"."""
        return None if kind == "none" else cls(kind, input_range)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of x. Under distributed training all processes see the
        extremes of the whole batch and so keep the same range."""
        low, high = x.min().float(), x.max().float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
        first = bool(self.low.isnan())
        self.low.copy_(low if first else torch.lerp(self.low, low, EMA))
        self.high.copy_(high if first else torch.lerp(self.high, high, EMA))

    def input_range(self) -> Tensor:
        """Scale and zero point of a static range, float32 `[2]`. Raises `LlmqError` for a range
        that has seen no data."""
        if bool(self.low.isnan()):
            raise LlmqError(
                "a static activation range has seen no data: run the model on text in training "
                "mode, or start from a result of GPTQ, which has ranges"
            )
        return static_range(self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "int8-token":
            return fake_quantize_per_token(x) if self.enabled else x
        if self.training and self.observing and not is_recomputing():
            self.observe(x)
        if not self.enabled or bool(self.low.isnan()):
            return x
        return fake_quantize_ranged(x, static_range(self.low, self.high))
