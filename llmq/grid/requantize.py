"""A quantized weight again, after a small change of its values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.grid import rounding
from llmq.grid.spec import PER_TENSOR
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.core.reference import expand_groups


def requantize(
    old: QuantizedTensor, weight: Tensor, generator: torch.Generator | None = None
) -> QuantizedTensor:
    """A float32 weight `[N, K]` rounded with the spec, the order of columns and the input range of
    `old`: to the nearest code, or with a generator to one of its two neighbours by chance, each as
    often as keeps the value on average.

    Each group keeps its grid or gets that of its own range, whichever has the smaller squared
    error: where the change is small the old grid holds the rest exactly, where it is large only a
    new one covers it."""
    spec, g_idx = old.spec, old.g_idx
    zero = None if old.zero is None else old.zero.float()
    scale = old.scale.float()
    kept_error = _group_errors(weight, old, scale, zero)
    order = _order(old)
    if order is not None:
        new_scale, new_zero = rounding.choose_scale(weight[:, order], spec)
        is_better = _group_errors(weight, old, new_scale, new_zero) < kept_error
        scale = torch.where(is_better, new_scale, scale)
        if zero is not None and new_zero is not None:
            zero = torch.where(is_better, new_zero, zero)
    if generator is not None:
        weight = weight + _steps(old, scale) * (torch.rand(old.shape, generator=generator) - 0.5)
    codes = rounding.quantize(weight, scale, zero, spec, g_idx)
    new = QuantizedTensor.from_codes(codes, scale, zero, spec, g_idx)
    return replace(new, input_range=old.input_range)


def _steps(old: QuantizedTensor, scale: Tensor) -> Tensor:
    """The scale of each column, `[N or 1, K or 1]`."""
    k = old.shape[1]
    return expand_groups(scale, k, old.spec.columns_per_group(k), old.g_idx)


def _order(old: QuantizedTensor) -> Tensor | None:
    """The columns group by group; None where the groups have not the sizes that the spec says, so
    that no new grid can be chosen for them."""
    k = old.shape[1]
    if old.g_idx is None:
        return torch.arange(k)
    sizes = torch.bincount(old.g_idx.long(), minlength=old.spec.n_groups(k))
    plain = torch.arange(k) // old.spec.columns_per_group(k)
    if not torch.equal(sizes, torch.bincount(plain)):
        return None
    return torch.argsort(old.g_idx, stable=True)


def _group_errors(
    weight: Tensor, old: QuantizedTensor, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """Squared error of rounding to a grid, shaped like the scale."""
    spec, (n, k) = old.spec, old.shape
    rounded = rounding.fake_quantize(weight, scale, zero, spec, old.g_idx)
    squares = rounded.sub_(weight).square_()
    if spec.group_size == PER_TENSOR:
        return squares.sum().view(1, 1)
    groups = old.g_idx
    if groups is None:
        groups = torch.arange(k) // spec.columns_per_group(k)
    return torch.zeros(n, spec.n_groups(k)).index_add_(1, groups.long(), squares)
