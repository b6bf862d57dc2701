"""From blocks in a file to a weight that llmq's kernels run on, with the same values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.formats.gguf.blocks import BLOCKS, Q4_1, decode_q4_1
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor

READ = frozenset({"Q4_0", "Q4_1", "Q8_0", "Q2_0", "TQ2_0"})
_USUAL_GROUPS = (128, 64)  # that the kernels are tuned for
_INT4 = 15


def weight_of(name: str, content: Tensor, shape: tuple[int, int]) -> QuantizedTensor | None:
    """The weight of blocks of a type in `READ`; None where llmq has no code for its values, as for
    minima that are no whole number of steps. Groups are as large as the scales allow."""
    if name == Q4_1.name:
        return _from_q4_1(content, shape)
    steps, scale = BLOCKS[name].decode(content, shape)
    low, high = int(steps.min()), int(steps.max())
    if name == "Q8_0":
        return _packed(steps + 128, scale, None, "int8")
    if name == "Q4_0":
        return _packed(steps + 8, scale, None, "int4")
    if high <= 1:
        return _packed(steps + 1, scale, None, "ternary")
    if low >= -1:  # levels -1, 0, 1 and 2: those of two bits, turned around
        return _packed(2 - steps, -scale, None, "int2")
    raise AssertionError(f"steps from {low} to {high} in {name}")


def _from_q4_1(content: Tensor, shape: tuple[int, int]) -> QuantizedTensor | None:
    codes, scale, minimum = decode_q4_1(content, shape)
    divisor = scale.float().masked_fill(scale == 0, 1)
    zero = (-minimum.float() / divisor).round()
    is_whole = (-scale.float() * zero == minimum.float()) & (zero >= 0) & (zero <= _INT4)
    if not bool(is_whole.all()):
        return None
    return _packed(codes, scale, zero.to(torch.uint8), "int4")


def _packed(codes: Tensor, scale: Tensor, zero: Tensor | None, code: str) -> QuantizedTensor:
    """With the largest groups whose blocks have the same scale and zero point."""
    k = codes.shape[1]
    spec = QuantSpec(code, k // scale.shape[1], symmetric=zero is None)
    spec = replace(spec, group_size=_group_size(k, scale, zero, spec.group_size))
    step = spec.columns_per_group(k) * scale.shape[1] // k
    rows = slice(0, 1) if spec.group_size == PER_TENSOR else slice(None)
    own_zero = None if zero is None else zero[rows, ::step]
    return QuantizedTensor.from_codes(codes.to(torch.uint8), scale[rows, ::step], own_zero, spec)


def _group_size(k: int, scale: Tensor, zero: Tensor | None, block: int) -> int:
    grids = [scale] if zero is None else [scale, zero]
    if all(bool((grid == grid[:, :1]).all()) for grid in grids):
        is_one = zero is None and bool((scale == scale[:1, :1]).all())
        return PER_TENSOR if is_one else PER_ROW
    for size in _USUAL_GROUPS:
        if k % size or size <= block:
            continue
        groups = [grid.view(grid.shape[0], -1, size // block) for grid in grids]
        if all(bool((group == group[..., :1]).all()) for group in groups):
            return size
    return block
