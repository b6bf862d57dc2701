"""What changes during a run, as functions of the share of it that is done. Nothing here has a
state, so a resumed run is at the same point as an uninterrupted one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from llmq.errors import LlmqError
from llmq.fields import check_fields
from llmq.qat.weights import fake_quant_modules


@dataclass(frozen=True)
class Phases:
    """All as shares of the run. warmup: learning rates rise. gradual: lambda rises from 0 to 1.
    activations: quantization of activations is switched on. freeze_scales: scales stop.
    freeze_ranges: static activation ranges stop following the data."""

    warmup: float = 0.03
    gradual: float = 0.0
    activations: float = 0.0
    freeze_scales: float = 0.85
    freeze_ranges: float = 0.85

    def __post_init__(self) -> None:
        check_fields(self, "phase ")
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise LlmqError(f"phase {name} = {value}: expected a share of the run, from 0 to 1")

    def learning_rate(self, done: float, *, scales: bool = False) -> float:
        """Factor on the learning rate: linear warm-up, then half a cosine to 0; scales end at
        `freeze_scales`."""
        end = self.freeze_scales if scales else 1.0
        if done >= end:
            return 0.0
        if done < self.warmup:
            return done / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / max(1e-9, end - self.warmup)))

    def strength(self, done: float) -> float:
        """Lambda of gradual quantization."""
        return 1.0 if self.gradual == 0 else min(done / self.gradual, 1.0)

    def apply(self, model: nn.Module, done: float) -> None:
        """Set the switches of every layer."""
        for module in fake_quant_modules(model).values():
            module.strength = self.strength(done)
            if module.activations is not None:
                module.activations.enabled = done >= self.activations
                module.activations.observing = done < self.freeze_ranges
