"""Coordinate descent after GPTQ: every code and every scale gets a second look, now that all the
others are known.

The squared output error `tr(R H R^T)`, R = W - Q, is a quadratic in each single column: with P = R
H its best value for column j is `q_j + P_j / H_jj`, rounded to the grid (the exact minimum, because
the quadratic is symmetric around it). For the scale of a group with integers c = code - zero the
best value is `s + (P_g . c) / (c H_gg c)`. Each step can only lower the error (QuantEase, Behdin et
al., 2023, for the columns)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.grid import rounding
from llmq.grid.spec import PER_TENSOR
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.methods.columns import joined

BLOCK_COLUMNS = 128


class _Descent:
    """The state of a descent, transposed so that a column of W is a contiguous row: values `[K,
    N]`, P^T = H R^T `[K, N]`."""

    def __init__(self, weight: Tensor, tensor: QuantizedTensor, hessian: Tensor) -> None:
        self.spec, self.hessian = tensor.spec, hessian
        # First, and gone before anything else is made: a float32 copy of stacked rows is the
        # largest thing that a block needs beside its weights.
        self.product_t = hessian @ tensor.dequantize().neg_().add_(weight).T
        k = weight.shape[1]
        g_idx = tensor.g_idx
        self.group_of = (
            torch.arange(k, device=weight.device) // self.spec.columns_per_group(k)
            if g_idx is None
            else g_idx.long()
        )
        self.scale_t = tensor.scale.float().T.contiguous()  # [G, N or 1]
        zero = tensor.zero
        self.zero_t = (
            torch.full_like(self.scale_t, self.spec.levels.offset)
            if zero is None
            else zero.float().T.contiguous()
        )
        self.integers_t = tensor.codes().T.contiguous().float()
        self._shift_integers(-self.zero_t)  # code - zero, [K, N]

    def _shift_integers(self, shift_t: Tensor) -> None:
        """Add `[G, N or 1]` to the integers, by blocks: spread over all columns at once it would be
        another copy of the weight."""
        for integers, groups in zip(
            self.integers_t.split(BLOCK_COLUMNS), self.group_of.split(BLOCK_COLUMNS), strict=True
        ):
            integers += shift_t[groups]

    def sweep_scales(self) -> None:
        """Least squares for the scale of each row in each group, rounded as it will be stored."""
        for group in range(self.scale_t.shape[0]):
            columns = torch.nonzero(self.group_of == group).flatten()
            integers = self.integers_t[columns]
            curvature = (integers * (self.hessian[columns][:, columns] @ integers)).sum(0)
            slope = (integers * self.product_t[columns]).sum(0)
            old = self.scale_t[group]
            moved = torch.where(curvature > 0, old + slope / curvature.clamp_min(1e-30), old)
            # A scale that would vanish or change sign belongs to a group without information.
            new = rounding.round_scale(torch.where(moved > 0.1 * old, moved, old), self.spec)
            self.product_t.addmm_(self.hessian[:, columns], integers * (old - new))
            self.scale_t[group] = new

    def sweep_codes(self) -> None:
        """One pass over the columns."""
        k = len(self.group_of)
        curvature = self.hessian.diagonal().clamp_min(1e-30).tolist()
        groups = self.group_of.tolist()
        # Columns are taken apart once: on layers of a few hundred rows, finding them costs more
        # than the arithmetic.
        scales, lows, highs = (
            self.scale_t.unbind(),
            (-self.zero_t).unbind(),
            (self.spec.levels.max - self.zero_t).unbind(),
        )
        new = torch.empty_like(self.integers_t[0])
        for start in range(0, k, BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, k)
            local = self.product_t[start:stop].clone()
            block = self.hessian[start:stop, start:stop]
            change = torch.empty_like(local)
            columns = zip(
                self.integers_t[start:stop].unbind(),
                local.unbind(),
                change.unbind(),
                groups[start:stop],
                curvature[start:stop],
                strict=True,
            )
            for i, (integers, slope, moved, group, bend) in enumerate(columns):
                best = torch.addcdiv(integers, slope, scales[group], value=1 / bend, out=new)
                rounding.round_steps(best, lows[group], highs[group])
                torch.sub(integers, new, out=moved).mul_(scales[group])
                integers.copy_(new)
                local[i + 1 :].addr_(block[i, i + 1 :], moved)
            self.product_t.addmm_(self.hessian[:, start:stop], change)

    def result(self, tensor: QuantizedTensor) -> QuantizedTensor:
        del self.product_t
        self._shift_integers(self.zero_t)
        codes = self.integers_t.to(torch.uint8).T
        return QuantizedTensor.from_codes(
            codes,
            self.scale_t.T,
            None if tensor.zero is None else self.zero_t.T,
            self.spec,
            tensor.g_idx,
        )


def refine(
    weight: Tensor, tensor: QuantizedTensor, hessian: Tensor, n_sweeps: int
) -> QuantizedTensor:
    """Lower `tr(R H R^T)` of a quantized weight by `n_sweeps` passes over its scales and codes.

    weight: float32 `[N, K]`. hessian: float32 `[K, K]`, damped. Scales shared by several rows are
    left as they are."""
    descent = _Descent(weight, tensor, hessian)
    for _ in range(n_sweeps):
        if tensor.spec.group_size != PER_TENSOR:
            descent.sweep_scales()
        descent.sweep_codes()
    return descent.result(tensor)


class _DescentsTogether:
    """Descents over layers of one shape and spec, with groups of consecutive columns."""

    def __init__(self, descents: Sequence[_Descent]) -> None:
        self.descents = descents
        self.product_t, self.integers_t, self.scale_t, zero_t = (
            joined(descents, name) for name in ("product_t", "integers_t", "scale_t", "zero_t")
        )
        self.low_t, self.high_t = -zero_t, descents[0].spec.levels.max - zero_t  # [E, G, N]
        bends = torch.stack([descent.hessian.diagonal() for descent in descents])
        # In float64, as Python divides where there is one layer.
        self.inverse = bends.clamp_min(1e-30).double().reciprocal().float()  # [E, K]

    def sweep_codes(self) -> None:
        """As `_Descent.sweep_codes`."""
        groups = self.descents[0].group_of.tolist()
        scales, lows, highs = (
            values.unbind(1) for values in (self.scale_t, self.low_t, self.high_t)
        )
        new = torch.empty_like(self.integers_t[:, 0])
        for start in range(0, len(groups), BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, len(groups))
            local = self.product_t[:, start:stop].clone()
            block = torch.stack([one.hessian[start:stop, start:stop] for one in self.descents])
            change = torch.empty_like(local)
            columns = zip(
                self.integers_t[:, start:stop].unbind(1),
                local.unbind(1),
                change.unbind(1),
                groups[start:stop],
                self.inverse[:, start:stop, None].unbind(1),
                strict=True,
            )
            for i, (integers, slope, moved, group, inverse) in enumerate(columns):
                torch.mul(slope, inverse, out=new).div_(scales[group]).add_(integers)
                rounding.round_steps(new, lows[group], highs[group])
                torch.sub(integers, new, out=moved).mul_(scales[group])
                integers.copy_(new)
                local[:, i + 1 :].addcmul_(block[:, i, i + 1 :, None], moved[:, None])
            for one, moved in zip(self.descents, change, strict=True):
                one.product_t.addmm_(one.hessian[:, start:stop], moved)


def refine_together(
    weights: Sequence[Tensor],
    tensors: Sequence[QuantizedTensor],
    hessians: Sequence[Tensor],
    n_sweeps: int,
) -> list[QuantizedTensor]:
    """What `refine` makes of each of several layers of one shape and spec, with the calls of one
    layer: see `llmq.ptq.methods.columns`. Not for one scale per tensor or act-order."""
    descents = [
        _Descent(weight, tensor, hessian)
        for weight, tensor, hessian in zip(weights, tensors, hessians, strict=True)
    ]
    together = _DescentsTogether(descents)
    for _ in range(n_sweeps):
        for descent in descents:
            descent.sweep_scales()
        together.sweep_codes()
    return [one.result(tensor) for one, tensor in zip(descents, tensors, strict=True)]
