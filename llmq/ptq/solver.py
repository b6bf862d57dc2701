"""What layer solvers share: the rows that they take at a time, and what they give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor

ROW_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class RowErrors:
    """Mean squared output errors per token of each row, float64 `[N]`, of the result and of plain
    rounding, from one and the same target: the weight's own outputs, or these corrected for what
    the layers before lost."""

    result: Tensor
    rounding: Tensor

    def rows(self, start: int, stop: int) -> RowErrors:
        """Those of some rows."""
        return RowErrors(self.result[start:stop], self.rounding[start:stop])


def stack_errors(parts: Sequence[RowErrors]) -> RowErrors:
    """Those of several parts, one below the other."""
    return RowErrors(
        torch.cat([part.result for part in parts]), torch.cat([part.rounding for part in parts])
    )


@dataclass(frozen=True)
class SolverResult:
    """tensor: the quantized weight. damping: the share of the median diagonal that the Hessian
    needed. n_dead: columns whose input was always zero. fallback: None, or why plain rounding was
    used instead. is_rounding: plain rounding replaced the result, since it was better. errors: how
    far from what the solver aimed at, or None if it aimed at nothing but the weight."""

    tensor: QuantizedTensor
    damping: float = 0.0
    n_dead: int = 0
    fallback: str | None = None
    is_rounding: bool = False
    errors: RowErrors | None = None


def row_blocks(weight: Tensor, spec: QuantSpec) -> list[slice]:
    """Rows that are solved together. With H given they are independent of each other, and a solve
    holds four copies of its rows: gate and up of a block 2048 wide, solved whole, were the peak of
    a run. On a GPU the calls per column are what a solve costs, and one scale for the whole tensor
    ties its rows together: there it is all rows at once."""
    n, k = weight.shape
    at_once = (
        n
        if weight.is_cuda or spec.group_size == PER_TENSOR
        else max(1, ROW_BLOCK_BYTES // (weight.element_size() * k))
    )
    return [slice(start, min(start + at_once, n)) for start in range(0, n, at_once)]
