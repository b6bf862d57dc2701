"""A low-rank change of a master weight, trained through its quantizer in the weight's place.

LoRA (Hu et al., 2021) adds a product of two thin matrices to what a layer gives; here they are
added to the weight before it is quantized. So the layer stays one packed matrix, nothing is rounded
after training, and gradients and moments of an optimizer are of the thin matrices alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError


class LoRA(nn.Module):
    """down: float32 `[r, K]`, normal with a variance of 1 / r, so that a step of `up` is a step of
    the weight about as large. up: float32 `[N, r]`, zero at the start."""

    def __init__(self, rank: int, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        n, k = weight.shape
        down = torch.randn(rank, k, generator=generator) * rank**-0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(n, rank, device=weight.device))

    def forward(self) -> Tensor:
        """The change of the weight, float32 `[N, K]`, whatever the arithmetic of the run is: what
        is stored is computed outside of it."""
        with torch.autocast(self.up.device.type, enabled=False):
            return self.up @ self.down


def check_rank(rank: int) -> None:
    """Raise `LlmqError` for what is no rank."""
    if rank < 1:
        raise LlmqError(f"LoRA rank {rank}: expected at least 1, such as 16")
