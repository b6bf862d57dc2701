"""Scales and zero points fitted to the weights alone: no text, some seconds per billion weights.

As in HQQ (Badri and Shaji, 2023), codes and grid take turns: with the codes held, scale and zero
point are the least squares fit of the grid to the weights, each weighted by how far off it is;
then the weights are rounded again. HQQ weighs errors so that outliers count little, |e|^0.7. Here
they count much, |e|^4: weights that stand out multiply inputs that do, and clipping them costs a
model more than a finer grid gives the others (figures in the README of `llmq/ptq`). Zero points are
whole numbers in this representation, so they are rounded after each fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.grid import rounding
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor, stack_rows
from llmq.ptq.methods.base import Rounding, Shape
from llmq.ptq.solver import ROW_BLOCK_BYTES, SolverResult, row_blocks
from llmq.ptq.stats import LayerStats
from llmq.recipe import Recipe

FACTORS = tuple(1 - 0.04 * i for i in range(11))  # of the range, that a fit may start from
N_STEPS = 4


@dataclass(frozen=True)
class _Grid:
    """Scale, and zero point where there is one, of each group, float32 `[N or 1, G]`."""

    scale: Tensor
    zero: Tensor | None

    def better_of(self, other: _Grid, is_better: Tensor) -> _Grid:
        """The other one's groups where it is better."""
        zero = self.zero
        if zero is not None and other.zero is not None:
            zero = torch.where(is_better, other.zero, zero)
        return _Grid(torch.where(is_better, other.scale, self.scale), zero)


def hqq(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Quantize a float32 weight `[N, K]`. Of all grids the one with the smallest sum of |W - Q|^4
    is taken, group by group, so none is worse than the range."""
    groups = rounding.grouped(weight, spec)
    full, zero = rounding.range_scale(weight, spec)
    best = _Grid(rounding.round_scale(full, spec), zero)
    lowest = _loss(groups, best, spec)
    for factor in FACTORS[1:]:
        grid = _Grid(rounding.round_scale(full * factor, spec), zero)
        loss = _loss(groups, grid, spec)
        best = best.better_of(grid, loss < lowest)
        lowest = torch.minimum(loss, lowest)
    grid = best
    for _ in range(N_STEPS):
        grid = _fitted(groups, grid, spec)
        loss = _loss(groups, grid, spec)
        best = best.better_of(grid, loss < lowest)
        lowest = torch.minimum(loss, lowest)
    return QuantizedTensor.round(weight, best.scale, best.zero, spec)


def _rounded_steps(groups: Tensor, grid: _Grid, spec: QuantSpec) -> Tensor:
    """What the codes say in units of the scale."""
    offset = spec.levels.offset if grid.zero is None else grid.zero[..., None]
    return rounding.round_codes(groups, grid.scale[..., None], offset, spec.levels.max).sub_(offset)


def _loss(groups: Tensor, grid: _Grid, spec: QuantSpec) -> Tensor:
    """Sum of |W - Q|^4 per group. The zeros that fill a last group up are always exact."""
    values = _rounded_steps(groups, grid, spec).mul_(grid.scale[..., None])
    return values.sub_(groups).square_().square_().sum(-1)


def _fitted(groups: Tensor, grid: _Grid, spec: QuantSpec) -> _Grid:
    """The weighted least squares fit of the codes to the weights. A group without errors, or whose
    codes are all zero, keeps its grid."""
    steps = _rounded_steps(groups, grid, spec)
    weights = (steps * grid.scale[..., None]).sub_(groups).square_()
    products = (weights * steps * groups).sum(-1)
    squares = (weights * steps).mul_(steps).sum(-1)
    is_fit = (squares > 0) & (products > 0)
    scale = rounding.round_scale(torch.where(is_fit, products / squares, grid.scale), spec)
    if grid.zero is None:
        return _Grid(scale, None)
    missing = (weights * (steps - groups / scale[..., None])).sum(-1)
    shift = missing / weights.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return _Grid(scale, rounding.round_zero(grid.zero + shift, spec))


class HQQ(Rounding):
    """Every layer by `hqq`."""

    def solve(
        self, weight: Tensor, stats: LayerStats | None, spec: QuantSpec, recipe: Recipe
    ) -> SolverResult:
        parts = [hqq(weight[rows], spec) for rows in row_blocks(weight, spec)]
        return SolverResult(stack_rows(parts))

    def solve_bytes(self, shape: Shape) -> int:
        """Rows, codes, errors and targets of a block of rows beside what rounding holds."""
        return super().solve_bytes(shape) + 8 * ROW_BLOCK_BYTES

    def solve_flops(self, shape: Shape) -> float:
        n, k = shape
        return 8.0 * (len(FACTORS) * 8 + N_STEPS * 20) * n * k


METHOD = HQQ()
