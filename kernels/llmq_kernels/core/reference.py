"""The arithmetic in plain torch: the specification, the last fallback and the oracle of every
backend."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255  # steps of an INT8 range
EXACT_COLUMNS = 65536  # whose products of two bytes fit 32 bits: 255 * 128 * 65536 < 2^31


def expand_groups(
    per_group: Tensor, k: int, group_size: int, g_idx: Tensor | None = None
) -> Tensor:
    """Spread values per group `[N or 1, G]` over the columns: `[N or 1, k]`, or `[N or 1, 1]` when
    there is one group.

    group_size: columns per group; the last group may be shorter. g_idx: int32 `[k]`, the group of
    each column, where the groups are not consecutive (act-order)."""
    if g_idx is not None:
        return per_group[:, g_idx.long()]
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | float, group_size: int, g_idx: Tensor | None = None
) -> Tensor:
    """`scale * (code - zero)` in float32 `[N, K]`.

    codes: uint8 `[N, K]`; scale: float `[N or 1, G]`; zero: `[N or 1, G]`, or one number for all.
    The product of an integer of at most 9 bits and a float16 or bfloat16 scale fits into the 24
    bits of a float32: nothing is rounded here."""
    k = codes.shape[1]
    shift = expand_groups(zero.float(), k, group_size, g_idx) if isinstance(zero, Tensor) else zero
    weight = codes.to(torch.float32)
    weight -= shift
    weight *= expand_groups(scale.float(), k, group_size, g_idx)
    return weight


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x `[..., K]` and a dequantized float32 weight `[N, K]`, computed
    and returned in x's dtype."""
    return torch.nn.functional.linear(
        x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 activations with one scale per token: u8 codes `[M, K]` around 128 and float32 scales
    `[M, 1]`, x = scale * (code - 128), from the token's largest magnitude."""
    values = x.float()
    scale = values.abs().amax(dim=1, keepdim=True).div_(127).clamp_min_(1e-8)
    return (values / scale).round_().add_(128).to(torch.uint8), scale


def quantize_static(x: Tensor, input_range: Tensor) -> Tensor:
    """INT8 activations with one scale and zero point for all: u8 codes shaped like x, x = scale *
    (code - zero). input_range: float32 `[2]`, scale and zero."""
    scale, zero = input_range
    return (x.float() / scale).round_().add_(zero).clamp_(0, LEVELS).to(torch.uint8)


def fake_quantize_static(x: Tensor, input_range: Tensor) -> Tensor:
    """x as `quantize_static` would store it, float32."""
    scale, zero = input_range
    return (quantize_static(x, input_range).float() - zero) * scale


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """x as `quantize_tokens` would store it, float32."""
    codes, scale = quantize_tokens(x)
    return (codes.float() - 128) * scale


def quantize_token_ranges(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 activations with a scale and zero point per token: int8 codes `[M, K]`, float32 scales
    and zero points `[M, 1]`, x = scale * (code - zero), from the token's smallest and largest value
    and 0. The zero point is an integer, rounded from the end of the range that leaves the smaller
    error, as KleidiAI does."""
    values = x.float()
    least = values.amin(dim=1, keepdim=True).clamp_max_(0)
    most = values.amax(dim=1, keepdim=True).clamp_min_(0)
    steps = torch.where(least == most, 1.0, LEVELS / (most - least))  # per unit of x
    from_least, from_most = -128 - least * steps, 127 - most * steps
    error = (-128 + least * steps) + (127 + most * steps)
    zero = torch.where(error > 0, from_least, from_most).clamp_(-128, 127).round_()
    codes = ((values * steps).round_() + zero).clamp_(-128, 127).to(torch.int8)
    return codes, 1 / steps, zero


def fake_quantize_token_ranges(x: Tensor) -> Tensor:
    """x as `quantize_token_ranges` would store it, float32."""
    codes, scale, zero = quantize_token_ranges(x)
    return (codes.float() - zero) * scale


def activation_group(bits: int, group_size: int) -> int:
    """Columns that share a scale of INT8 activations quantized per token and group, for a weight
    with groups of `group_size` columns (K, when it has one scale per row): the largest of 128, 64
    and 32 that divides it. A weight per row has activations in groups of 128; with 8 bits it is 64
    at most, a group being as wide as what one 64-byte load holds."""
    size = next((size for size in (128, 64, 32) if group_size % size == 0), 128)
    return min(size, 64) if bits == 8 else size


def quantize_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """INT8 activations with a scale per token and group of columns: int8 codes `[M, K]` in -127 ..
    127 and float32 scales `[M, ceil(K / group_size)]`."""
    m, k = x.shape
    n_groups = -(-k // group_size)
    groups = torch.nn.functional.pad(x.float(), (0, n_groups * group_size - k)).view(
        m, n_groups, group_size
    )
    scale = groups.abs().amax(dim=2).div_(127).clamp_min_(1e-8)
    return (groups / scale[..., None]).round_().to(torch.int8).view(m, -1)[:, :k], scale


def fake_quantize_groups(x: Tensor, group_size: int) -> Tensor:
    """x as `quantize_groups` would store it, float32."""
    codes, scale = quantize_groups(x, group_size)
    return codes.float() * expand_groups(scale, x.shape[1], group_size)
