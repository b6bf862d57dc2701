"""The same values under another spec: what one format stores as ternary codes, another stores as
2-bit integers, and a scale for 128 columns is one for each 64 of them.

`recode` is exact or refused. `specs_for` lists what a weight could become, the smallest first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.grid.spec import PER_ROW, PER_TENSOR, SMALLER_GROUPS, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.core.codes import CODES


def specs_for(spec: QuantSpec, shape: tuple[int, int]) -> list[QuantSpec]:
    """Specs that may hold a weight `[N, K]` of this one, its own first, then by the bits that they
    take: as many bits a code or more, with and without zero points, scales for as many columns or
    fewer."""
    codes = [code for code in CODES.values() if code.bits >= spec.bits]
    found = [
        QuantSpec(code.name, group_size, symmetric=symmetric, scale_dtype="float16")
        for code in codes
        for group_size in _group_sizes(spec, shape[1])
        for symmetric in (True, False)
        if symmetric or code.has_zero_points
    ]
    own_dtype = [replace(each, scale_dtype=spec.scale_dtype) for each in found]
    # dict.fromkeys drops doubles and keeps the order
    ordered = sorted(dict.fromkeys(found + own_dtype), key=lambda each: _cost(each, spec, shape))
    return list(dict.fromkeys([spec, *ordered]))


def _group_sizes(spec: QuantSpec, k: int) -> list[int]:
    columns = spec.columns_per_group(k)
    smaller = [size for size in SMALLER_GROUPS if size < columns and k % size == 0]
    whole_rows = [PER_ROW] if columns >= k else []
    return list(dict.fromkeys([spec.group_size, *whole_rows, *smaller]))


def _cost(candidate: QuantSpec, spec: QuantSpec, shape: tuple[int, int]) -> tuple[float, bool]:
    """Bits per weight, and of equal ones that of the same code first."""
    return candidate.bits_per_weight(*shape), candidate.code != spec.code


def recode(qtensor: QuantizedTensor, spec: QuantSpec) -> QuantizedTensor | None:
    """The weight with the very same float32 values under another spec, without an order of columns
    of its own; None where that cannot hold it."""
    moved = _scales_of(qtensor, spec)
    if moved is None:
        return None
    scale, zero, column_zero = moved
    offset, target = qtensor.spec.levels.offset, spec.levels
    if spec.symmetric:
        shift = target.offset - column_zero
    elif qtensor.zero is not None:
        shift = torch.zeros_like(column_zero)
    else:
        shift = (target.offset - offset) * torch.ones_like(column_zero)
    if bool((shift % 1 != 0).any()):
        return None  # half steps
    codes = qtensor.codes() + shift.to(torch.int16)
    if int(codes.min()) < 0 or int(codes.max()) > target.max:
        return None
    if not spec.symmetric:
        zero = zero + (0 if qtensor.zero is not None else target.offset - offset)
        if float(zero.min()) < 0 or float(zero.max()) > target.max:
            return None
    stored_zero = None if spec.symmetric else zero.to(torch.uint8)
    found = QuantizedTensor.from_codes(codes.to(torch.uint8), scale, stored_zero, spec)
    return replace(found, input_range=qtensor.input_range)


def _scales_of(qtensor: QuantizedTensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor] | None:
    """Scales and zero points, float32, shaped as `spec` has them, and the zero point of each column
    `[N, K]`; None where columns that share a scale there do not share one here, or where its dtype
    does not hold them."""
    (n, k), own = qtensor.shape, qtensor.spec
    group_of = qtensor.g_idx
    if group_of is None:
        group_of = torch.arange(k) // own.columns_per_group(k)
    scale = qtensor.scale.float()
    zero = torch.full_like(scale, own.levels.offset) if qtensor.zero is None else qtensor.zero
    n_groups = own.n_groups(k)
    scales, zeros = (part.float().expand(n, n_groups)[:, group_of.long()] for part in (scale, zero))
    first = torch.arange(0, k, spec.columns_per_group(k))
    kept = (scales[:, first], zeros[:, first])
    if spec.group_size == PER_TENSOR:
        kept = (kept[0][:1, :1], kept[1][:1, :1])
    new_group_of = torch.arange(k) // spec.columns_per_group(k)
    for part, of_column in zip(kept, (scales, zeros), strict=True):
        if not torch.equal(part.expand(n, -1)[:, new_group_of], of_column):
            return None
    stored = kept[0].to(getattr(torch, spec.scale_dtype)).float()
    if not torch.equal(stored, kept[0]):
        return None
    return kept[0], kept[1], zeros
