"""The quantizer with a gradient: what a weight is after storage going forward, the straight-through
estimator going back.

The value is `quantizer.fake_quantize`, bit for bit: w' = s (q - z) with q = clamp(round(w / s) + z,
0, max). Rounding has no useful derivative, so it counts as the identity (Bengio et al., 2013), and
what is left of the formula is differentiated as it stands. With v = w / s and c = q - z:

                     dw'/dw    dw'/ds    dw'/dz
    inside the range    1       c - v       0        (c - v is the rounding error in steps, at most
                        a half)
    clipped             0       c          -s        (c is -z or max - z)

dw'/ds is that of LSQ (Esser et al., 2020), dw'/dz the one of LSQ+ (Bhalgat et al., 2020). A weight
counts as clipped when its code was clamped, that is half a step beyond the last level (LSQ itself
draws the line at the last level): a weight that is still nearest to the last code on its own then
keeps its gradient and can come back, which matters at 2 bits, where every second code is a last
one.

Scale and zero point may be continuous masters: they are rounded here as they will be stored, with
the identity as their derivative, so that training never sees a value that the disk cannot hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.grid import rounding
from llmq.grid.spec import PER_TENSOR, QuantSpec


def straight_through(x: Tensor, value: Tensor, kept: Tensor | None = None) -> Tensor:
    """`value` going forward; going back, x gets the gradient as it is, or only where the mask
    `kept` is true. All three have x's shape."""
    passed: Tensor = _StraightThrough.apply(x, value, kept)
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(kept)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] if kept is None else gradients[0] * kept), None, None


def fake_quantize_ste(
    weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, scale_gradient: float = 1.0
) -> Tensor:
    """The weight as it will be after storage, float32 `[N, K]`, with gradients to weight, scale and
    zero (see the module's text).

    weight: float32 `[N, K]`. scale: float32 `[N or 1, G]`, positive. zero: float32, shaped like
    scale, or None for the code's own offset. scale_gradient: factor on the gradient of the scale,
    `lsq_factor` for plain SGD; Adam is blind to it. Groups are consecutive columns: there is no
    `g_idx`. Raises `LlmqError` when a scale does not fit into its dtype."""
    value: Tensor = _FakeQuantize.apply(weight, scale, zero, spec, scale_gradient)
    return value


def lsq_factor(spec: QuantSpec, n: int, k: int) -> float:
    """LSQ's factor on the gradient of a scale of an `[n, k]` weight, `1 / sqrt(weights per scale *
    largest level)`: it makes steps of scales and of weights alike in proportion."""
    per_scale = n * k if spec.group_size == PER_TENSOR else spec.columns_per_group(k)
    return float((per_scale * max(1.0, spec.levels.max - spec.levels.offset)) ** -0.5)


def _ungrouped(grouped: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """The inverse of `quantizer.grouped`."""
    return (
        grouped.reshape(shape)
        if spec.group_size == PER_TENSOR
        else grouped.flatten(1)[:, : shape[1]]
    )


class _FakeQuantize(torch.autograd.Function):
    """Nothing is kept for the backward pass but the weight, which is alive anyway, and the scales:
    codes are computed again, since under autocast the product keeps a copy of the value in its own
    dtype, and the float32 one would be in memory beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        spec: QuantSpec,
        scale_gradient: float,
    ) -> Tensor:
        stored_scale = rounding.round_scale(scale, spec)
        stored_zero = None if zero is None else rounding.round_zero(zero, spec)
        offset = spec.levels.offset if stored_zero is None else stored_zero[..., None]
        codes = rounding.round_codes(
            rounding.grouped(weight, spec), stored_scale[..., None], offset, spec.levels.max
        )  # [N or 1, G, columns per group]
        value = _ungrouped(codes.sub_(offset).mul_(stored_scale[..., None]), weight.shape, spec)
        ctx.save_for_backward(weight, stored_scale, stored_zero)
        ctx.spec, ctx.scale_gradient = spec, scale_gradient
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, stored_scale, stored_zero = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        gradient, step = rounding.grouped(gradients[0], spec), stored_scale[..., None]
        offset = spec.levels.offset if stored_zero is None else stored_zero[..., None]
        grouped = rounding.grouped(weight, spec)
        integers = rounding.round_codes(grouped, step, offset, spec.levels.max).sub_(offset)  # c
        overshoot = (grouped / step).sub_(integers)  # v - c
        inside = overshoot.abs() <= 0.5
        passed = gradient * inside
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, overshoot.neg_(), integers)
            to_scale = slope.mul_(gradient).sum(-1).mul_(ctx.scale_gradient)
        if ctx.needs_input_grad[2]:
            to_zero = (passed.sum(-1) - gradient.sum(-1)).mul_(stored_scale)
        return _ungrouped(passed, weight.shape, spec), to_scale, to_zero, None, None
