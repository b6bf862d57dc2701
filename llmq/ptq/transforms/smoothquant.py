"""SmoothQuant (Xiao et al., 2022): channels of activations that are far larger than the others are
made smaller, and the columns of the weights that they meet larger.

Rounding activations to one range for all of them is hard, rounding weights is not: each row has a
scale of its own. The largest inputs and the largest weights of a channel meet halfway."""

from __future__ import annotations

from torch import Tensor

from llmq.ptq.transforms.base import Transform

ALPHA = 0.5  # share of the difficulty that moves into the weights


class SmoothQuant(Transform):
    name = "smoothquant"

    def factors(self, largest: Tensor, weight: Tensor) -> Tensor:
        """`|x|^alpha / |w|^(1 - alpha)` of the largest of both, 1 where one of them is zero."""
        of_weights = weight.abs().amax(dim=0)
        factors = largest.pow(ALPHA) / of_weights.pow(1 - ALPHA)
        return factors.where((largest > 0) & (of_weights > 0), factors.new_ones(()))


TRANSFORM = SmoothQuant()
