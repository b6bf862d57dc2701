"""What a transform is: a factor for every input channel of layers that read the same tensor."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Transform(Protocol):
    """What multiplies the columns of weights, while the inputs are divided by it. name: as
    `--method` takes it."""

    name: str

    def factors(self, largest: Tensor, weight: Tensor) -> Tensor:
        """Of each input channel, positive float32 `[K]`, for what is computed afterwards to stay
        what it is. largest: the largest magnitude of the channel's inputs `[K]`. weight: of all
        layers that read them, one below the other, `[N, K]`."""
