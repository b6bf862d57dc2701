"""Static ranges of activations from calibration data (Jacob et al., 2018): one scale and zero point
per layer input.

Three ways to choose them. "minmax" clips nothing, and one outlier makes every step coarser.
"percentile" clips the outermost 0.01% on each side. "mse" shrinks the range as long as the mean
squared error over the samples falls, which weighs coarse steps against clipping by what was seen;
it is the default."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq_kernels.core.reference import LEVELS, fake_quantize_static

RangeMethod = Literal["minmax", "percentile", "mse"]
RANGE_METHODS = get_args(RangeMethod)
SAMPLES_PER_BATCH = 16384
TAIL = 1e-4
SHRINK_FACTORS = tuple(1 - 0.02 * i for i in range(41))  # 1.00 .. 0.20


def static_range(low: Tensor, high: Tensor) -> Tensor:
    """Scale and integer zero point (0..255), float32 `[2]`, of a range; it is widened to include 0,
    so that zeros are exact."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = ((high - low) / LEVELS).clamp_min(1e-8)
    return torch.stack((scale, torch.round(-low / scale).clamp(0, LEVELS)))


class RangeObserver:
    """Extremes and a seeded sample of all values added. leaf: of the calibration text whose values
    come first (`llmq.ptq.leaves`); each has draws of its own, whoever has those before it."""

    def __init__(self, leaf: int = 0) -> None:
        self._leaf = leaf
        self.low = torch.tensor(torch.inf)
        self.high = torch.tensor(-torch.inf)
        self._samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(leaf)

    def next_leaf(self) -> None:
        """What is added from now on belongs to the next leaf."""
        self._leaf += 1
        self._generator.manual_seed(self._leaf)

    def state(self) -> Tensor:
        """Everything that it has seen, float32 `[2 + n]`, for another one to `merge`."""
        return torch.cat([torch.stack([self.low, self.high]), *self._samples])

    def merge(self, state: Tensor) -> None:
        """Take in what another one has seen."""
        low, high = state[:2].unbind()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if len(state) > 2:
            self._samples.append(state[2:])

    def add(self, x: Tensor) -> None:
        """Add values of any shape; NaN and infinite ones are left out, as the Hessian leaves them
        out."""
        values = x.detach().float().flatten().cpu()
        values = values[torch.isfinite(values)]
        if not len(values):
            return
        self.low, self.high = (
            torch.minimum(self.low, values.min()),
            torch.maximum(self.high, values.max()),
        )
        self._samples.append(
            values[
                torch.randint(
                    len(values), (min(SAMPLES_PER_BATCH, len(values)),), generator=self._generator
                )
            ]
        )

    def range(self, method: RangeMethod = "mse") -> Tensor:
        """Scale and zero point, float32 `[2]`. Raises `LlmqError` when nothing was added or the
        method does not exist."""
        if method not in RANGE_METHODS:
            raise LlmqError(
                f"range of activations {method!r}: expected one of {', '.join(RANGE_METHODS)}"
            )
        if not self._samples:
            raise LlmqError(
                "no finite activation was seen, so no range can be chosen; use other calibration "
                "text"
            )
        if method == "minmax":
            return static_range(self.low, self.high)
        samples = torch.cat(self._samples).sort().values
        if method == "percentile":
            tail = int(TAIL * len(samples))
            return static_range(samples[tail], samples[-1 - tail])
        return min(
            (static_range(self.low * factor, self.high * factor) for factor in SHRINK_FACTORS),
            key=lambda candidate: _error(samples, candidate),
        )


def _error(samples: Tensor, candidate: Tensor) -> float:
    return float((fake_quantize_static(samples, candidate) - samples).square().mean())
