"""The only place that rounds.

One definition of scale, code and value serves post-training quantization, the fake-quantized
forward pass of training, the packer and the kernels, so that the codes are equal bit for bit along
the whole way. Two rules make that possible: scales are rounded to the dtype they are stored in
before any code is computed, and every code is `clamp(round_half_even(w / scale) + zero, 0, levels -
1)` in float32.

Choosing the scale is a one-dimensional problem per group: a few clipped outliers cost less than a
coarser grid for everybody else. `choose_scale` searches shrink factors down to 0.4 when it is given
an importance per column, the diagonal of the layer's Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq_kernels.core.reference import dequantize_codes, expand_groups

SHRINK_FACTORS = tuple(1 - 0.02 * i for i in range(31))  # 1.00 .. 0.40


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[N, K] -> [N, G, columns per group]; the last group is filled with zeros, which change
    neither a range nor an error. Per tensor: [1, 1, N * K]."""
    n, k = weight.shape
    if spec.group_size == PER_TENSOR:
        return weight.reshape(1, 1, n * k)
    size = spec.columns_per_group(k)
    padding = spec.n_groups(k) * size - k
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(n, -1, size)


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale as it will be stored, in float32; 0 (an empty group) becomes 1. Raises `LlmqError`
    when a scale does not fit into its dtype."""
    stored = scale.to(getattr(torch, spec.scale_dtype))
    if not torch.isfinite(stored).all():
        remedy = (
            'quantize with scales in bfloat16 ("scale_dtype": "bfloat16" in the rules of a '
            "recipe), or keep this layer"
        )
        raise LlmqError(
            f"a scale of {scale.abs().max().item():.3g} does not fit into {spec.scale_dtype}: "
            f"{remedy}"
        )
    return torch.where(stored == 0, torch.ones_like(stored), stored).float()


def round_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    """The zero point as it will be stored: a whole number in the range of the codes, in float32."""
    return zero.round().clamp_(0, spec.levels.max)


def range_scale(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale (not yet rounded) and zero point that cover the range of each group: absmax, min-max,
    or absmean for ternary. weight: float32 `[N, K]`; both `[N or 1, G]`."""
    groups = grouped(weight, spec)
    levels = spec.levels
    if levels.name == "ternary":
        counts = (
            grouped(torch.ones_like(weight[:1]), spec).sum(-1)
            if spec.group_size != PER_TENSOR
            else weight.numel()
        )
        return groups.abs().sum(-1) / counts, None
    if spec.symmetric:
        return 2 * groups.abs().amax(-1) / levels.max, None
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = (high - low) / levels.max
    return scale, round_zero(-low / torch.where(scale == 0, 1, scale), spec)


def choose_scale(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point per group of a float32 weight `[N, K]`.

    importance: float `[K]`, the weight of each column's squared error, such as diag(H); or `[N, K]`
    where rows belong to several layers. Without it the range of the group decides; with it the best
    of 31 shrink factors does, and, up to 4 bits, of the neighbouring zero points.
    Returns scale float32 `[N or 1, G]`, already rounded to its stored dtype, and zero (integers in
    float32) or None."""
    full, zero = range_scale(weight, spec)
    best_scale = round_scale(full, spec)
    if importance is None:
        return best_scale, zero
    groups = grouped(weight, spec)
    column_weight = (
        grouped(importance.expand_as(weight), spec)
        if spec.group_size == PER_TENSOR
        else grouped(torch.atleast_2d(importance), spec)
    )
    levels = spec.levels
    shifts = (0, -1, 1) if zero is not None and spec.bits <= 4 else (0,)
    best_zero = zero
    best_error = torch.full_like(full, torch.inf)
    for shift in shifts:
        candidate_zero = zero if zero is None else (zero + shift).clamp(0, levels.max)
        offset = levels.offset if candidate_zero is None else candidate_zero[..., None]
        for factor in _factors(spec):
            scale = round_scale(full * factor, spec)
            residual = _round_trip(groups, scale[..., None], offset, levels.max).sub_(groups)
            error = residual.square_().mul_(column_weight).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            if candidate_zero is not None and best_zero is not None:
                best_zero = torch.where(better, candidate_zero, best_zero)
    return best_scale, best_zero


def _factors(spec: QuantSpec) -> tuple[float, ...]:
    # The mean magnitude is a start, not a bound: ternary scales are searched on both sides of it.
    return (
        tuple(2 * factor for factor in SHRINK_FACTORS) if spec.code == "ternary" else SHRINK_FACTORS
    )


def round_codes(weight: Tensor, scale: Tensor, zero: Tensor | float, max_code: int) -> Tensor:
    """Codes as whole numbers in float32, shaped like weight; scale and zero broadcast. Everything
    that rounds goes through here or `round_steps`. zero: whole numbers, or one half-integer for
    all."""
    if not isinstance(zero, Tensor) and zero % 1:
        return (
            (weight / scale).add_(zero).round_().clamp_(0, max_code)
        )  # the levels lie half a step beside the whole numbers
    return (weight / scale).round_().add_(zero).clamp_(0, max_code)


def round_steps(steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The same for loops over single columns, in place: whole numbers, codes less their zero point,
    from weights in steps of their scale. low, high: the outermost ones, `code - zero`."""
    return steps.round_().clamp_(low, high)


def _round_trip(weight: Tensor, scale: Tensor, zero: Tensor | float, max_code: int) -> Tensor:
    return round_codes(weight, scale, zero, max_code).sub_(zero).mul_(scale)


def quantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, g_idx: Tensor | None = None
) -> Tensor:
    """Codes uint8 `[N, K]` of a float32 weight. scale: float32 `[N or 1, G]` as `choose_scale`
    gives it; zero: the same shape, or None for the code's own offset."""
    k = weight.shape[1]
    size = spec.columns_per_group(k)
    shift = spec.levels.offset if zero is None else expand_groups(zero.float(), k, size, g_idx)
    return round_codes(
        weight, expand_groups(scale.float(), k, size, g_idx), shift, spec.levels.max
    ).to(torch.uint8)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, g_idx: Tensor | None = None
) -> Tensor:
    """Values float32 `[N, K]` of codes."""
    return dequantize_codes(
        codes,
        scale,
        spec.levels.offset if zero is None else zero,
        spec.columns_per_group(codes.shape[1]),
        g_idx,
    )


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, g_idx: Tensor | None = None
) -> Tensor:
    """The weight as it will be after storage: `dequantize(quantize(weight))`, bit for bit, without
    going through integers."""
    k = weight.shape[1]
    size = spec.columns_per_group(k)
    shift = spec.levels.offset if zero is None else expand_groups(zero.float(), k, size, g_idx)
    return _round_trip(weight, expand_groups(scale.float(), k, size, g_idx), shift, spec.levels.max)
