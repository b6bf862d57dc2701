"""The backend `cpu-int4`: INT4 and narrower codes with bfloat16 activations, by torch's int4pack
operator.

For few rows of x the operator computes `((q - 8) * s + z) @ x` straight from packed bytes, at the
speed of memory. For more rows, blocks of the weight are expanded into bfloat16 values that stay in
the cache and go to the bfloat16 GEMM. Both read the same bytes: bands of 64 rows (32 without
AVX512) as `[K, 32]` bytes, row j of the band in the low and row j + 32 in the high half, which is
W^T as the GEMM wants it. The layout is not documented, so it is probed once, and a machine that
lays out otherwise uses the reference.

The operator rounds scales to bfloat16: 0.14% on average, the larger part of the tolerance that
tests grant this backend."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.capability import Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.packing import pack, unpack
from llmq_kernels.core.reference import expand_groups
from llmq_kernels.core.weight import PackedWeight

TAKES = (
    Takes(
        devices=("cpu",),
        activations=("none",),
        dtypes=(torch.bfloat16,),  # others work, but are not fast
        codes=(CODES["int4"], CODES["int3"], CODES["int2"], CODES["ternary"]),
        groups=32,
        zero="code",
    ),
)
GROUPS = (256, 128, 64, 32)  # what the operator accepts
# Rows of x up to which the operator beats expanding blocks, measured at 4096 x 4096.
MAX_ROWS = 48
# Rows of W expanded at a time: 8 MB of bfloat16 at K = 4096. Fewer and larger products are up to
# 1.5 times as fast as those of 256 rows, which would fit a 2 MB cache.
BLOCK_ROWS = 1024


# --- the layout -----------------------------------------------------------------------------------


def _from_bands(stored: Tensor, n: int, k: int, band: int) -> Tensor:
    """Codes uint8 `[n, k]` from int4pack bytes with bands of `band` rows; a last, smaller band
    interleaves its rows in pairs."""
    flat = stored.view(torch.uint8).reshape(-1)
    n_full = n // band * band
    parts = []
    if n_full:
        full = flat[: n_full * k // 2].view(n_full // band, k, band // 2)
        parts.append(torch.cat((full & 15, full >> 4), dim=-1).transpose(1, 2).reshape(n_full, k))
    if n > n_full:
        rest = flat[n_full * k // 2 :].view(k, (n - n_full) // 2)
        parts.append(torch.stack((rest & 15, rest >> 4), dim=-1).reshape(k, n - n_full).T)
    return torch.cat(parts).contiguous()


def _rows_from_bands(stored: Tensor, shape: tuple[int, int], band: int, index: Tensor) -> Tensor:
    """Codes uint8 `[m, k]` of the rows in index, int64 `[m]`, of `_from_bands`."""
    n, k = shape
    half, n_full = band // 2, n // band * band
    is_full, rest = index < n_full, index - n_full
    in_band = index // band * (k * half) + index % half
    start = torch.where(is_full, in_band, n_full * k // 2 + rest // 2)
    step = torch.where(is_full, half, (n - n_full) // 2)
    is_high = torch.where(is_full, index % band // half, rest % 2)
    offsets = start[:, None] + step[:, None] * torch.arange(k)
    flat = stored.view(torch.uint8).reshape(-1)
    return (flat[offsets] >> (4 * is_high[:, None]).to(torch.uint8)) & 15


@cache
def band_rows() -> int:
    """Rows per band of this machine's int4pack layout, or 0 when it is none that llmq knows."""
    codes = torch.randint(
        0, 16, (80, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    try:
        stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError, NotImplementedError):
        return 0
    return next(
        (
            band
            for band in (64, 32)
            if torch.equal(_from_bands(stored, 80, 64, band), codes.to(torch.uint8))
        ),
        0,
    )


# --- the backend ----------------------------------------------------------------------------------


def obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why int4pack cannot take a weight here, or None."""
    n, k = weight.shape
    if n % 16 or not _operator_group(weight):
        return (
            "it needs N divisible by 16 and groups of 32 that divide K, "
            f"not {n} x {k} in groups of {weight.group_size}"
        )
    if not band_rows():
        return "this CPU's int4pack layout is unknown"
    return None


def _operator_group(weight: PackedWeight) -> int | None:
    """The largest group size of the operator that divides the weight's own, so that scales can be
    repeated."""
    size = min(weight.group_size, weight.shape[1])
    return next(
        (group for group in GROUPS if size % group == 0 and weight.shape[1] % group == 0), None
    )


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """The operator's bytes, in place of the canonical words, and its scales `[K / G, N, 2]`: s and
    z with w = (q - 8) * s + z."""
    n, k = weight.shape
    group = _operator_group(weight)
    assert group is not None
    codes = unpack(weight.packed, weight.code.bits, k).to(torch.int32) + _code_shift(weight)
    stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def per_group(values: Tensor) -> Tensor:
        spread = expand_groups(values.expand(-1, values.shape[1]), k, weight.group_size)
        columns = spread[:, ::group] if spread.shape[1] == k else spread.expand(-1, k // group)
        return columns.expand(n, -1).T

    scale = per_group(weight.scale.float())
    shift = (
        torch.zeros_like(scale)
        if weight.zero is None or _shifts(weight)
        else (8 - per_group(weight.zero.float())) * scale.bfloat16()
    )
    scale_and_zero = torch.stack((scale, shift), dim=-1).bfloat16().contiguous()
    return {"packed": stored, "scale_and_zero": scale_and_zero}


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words."""
    n, k = weight.shape
    return pack(
        _from_bands(state["packed"], n, k, band_rows()).to(torch.int32) - _code_shift(weight),
        weight.code.bits,
    )


def rows(weight: PackedWeight, state: State, index: Tensor) -> Tensor:
    """The canonical words of some rows."""
    codes = _rows_from_bands(state["packed"], weight.shape, band_rows(), index).to(torch.int32)
    zero = None if weight.zero is None else weight.zero.expand(weight.shape[0], -1)[index]
    return pack(codes - _code_shift(replace(weight, zero=zero)), weight.code.bits)


def _shifts(weight: PackedWeight) -> bool:
    """Whether codes can be stored with their zero point moved to 8, so that no rounded product of
    scale and zero point has to be added: always, but for 4 bits with zero points."""
    return weight.zero is None or weight.code.bits < 4


def _code_shift(weight: PackedWeight) -> Tensor | int:
    """What is added to the codes for storage, int32, broadcastable to `[N, K]`."""
    if weight.zero is None:
        return 8 - int(weight.code.offset)
    return (
        8 - expand_groups(weight.zero.to(torch.int32), weight.shape[1], weight.group_size)
        if _shifts(weight)
        else 0
    )


def linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` for bfloat16 x `[M, K]`."""
    n, k = weight.shape
    scale_and_zero = state["scale_and_zero"]
    group = k // scale_and_zero.shape[0]
    if x.shape[0] <= MAX_ROWS:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), state["packed"], group, scale_and_zero
        )
    if n % band_rows():
        return torch.nn.functional.linear(x, _values(state, n, k).to(x.dtype))
    return _by_blocks(x, state["packed"], scale_and_zero, n, k, group)


def _values(state: State, n: int, k: int) -> Tensor:
    """The whole weight, float32 `[n, k]`, with the operator's own scales."""
    scale_and_zero = (
        state["scale_and_zero"]
        .float()
        .repeat_interleave(k // state["scale_and_zero"].shape[0], dim=0)
    )
    codes = _from_bands(state["packed"], n, k, band_rows()).float()
    return (codes - 8) * scale_and_zero[..., 0].T + scale_and_zero[..., 1].T


def _by_blocks(
    x: Tensor, stored: Tensor, scale_and_zero: Tensor, n: int, k: int, group: int
) -> Tensor:
    """Expand `BLOCK_ROWS` rows of W at a time into W^T `[K, rows]` and multiply. Zero points enter
    as one small product with the sums of x over each group."""
    band = band_rows()
    half = band // 2
    n_bands = n // band
    step = max(1, BLOCK_ROWS // band)
    bytes_by_band = stored.view(torch.int8).view(n_bands, k, half)
    signed, nibble = (torch.empty(step, k, half, dtype=torch.int8) for _ in range(2))
    values = torch.empty(k, step * band, dtype=torch.bfloat16)
    # Codes are expanded as 16 * (q - 8), which is what a byte with its low half cleared holds as
    # int8; dividing the scale by 16 is exact.
    scale = scale_and_zero[..., 0] / 16
    out = x.new_empty(x.shape[0], n)
    for start in range(0, n_bands, step):
        count = min(step, n_bands - start)
        rows = slice(start * band, (start + count) * band)
        block = values[:, : count * band]
        halves = block.view(k, count, 2, half).permute(2, 1, 0, 3)  # [2, bands, K, half]
        torch.bitwise_xor(
            bytes_by_band[start : start + count], -120, out=signed[:count]
        )  # flips both sign bits: q -> q - 8
        torch.mul(signed[:count], 16, out=nibble[:count])
        halves[0].copy_(nibble[:count])
        torch.bitwise_and(signed[:count], -16, out=nibble[:count])
        halves[1].copy_(nibble[:count])
        by_group = block.view(k // group, group, count * band)
        by_group.mul_(scale[:, None, rows])
        torch.mm(x, block, out=out[:, rows]) if count * band == n else out[:, rows].copy_(
            torch.mm(x, block)
        )
    zero = scale_and_zero[..., 1]
    if bool(zero.any()):
        sums = x.float().view(x.shape[0], k // group, group).sum(-1)
        out = torch.addmm(out.float(), sums, zero.float()).to(x.dtype)
    return out


BACKEND = Backend("cpu-int4", TAKES, obstacle, prepare, linear, restore, rows=rows)
