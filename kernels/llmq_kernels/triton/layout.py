"""How the Triton kernels hold a weight: the canonical codes in another order, so that a tensor core
finds its operand in the registers that unpacked it.

One thread of a tensor-core instruction holds, of 16 columns, the four {2j, 2j + 1, 2j + 8, 2j + 9}
for one j in 0..3 (16-bit numbers), or of 32 columns the eight {4j .. 4j + 3, 16 + 4j .. 16 + 4j +
3} (bytes). Codes are therefore stored so that what a thread unpacks is what it multiplies.

**Units (floating-point activations).** A unit is eight codes, four units are a block of 32 columns,
and unit j holds the columns `16 a + 8 b + 2 j + c` for a, b, c in {0, 1}. Its code number `4 c + 2
a + b` counts from the lowest bit, so the two neighbours c = 0, 1 lie half a unit apart, where one
mask takes both (`triton/dequantize`).

**Planes.** Codes of 3 bits straddle words. They are split into a plane of 2 and a plane of 1 bit,
codes of 8 bits into two planes of 4, so that the kernels know three unit widths: 4, 2 and 1 bytes.
The planes of a row follow one another.

**Bytes (INT8 activations).** Byte c of 16 holds the columns c, 16 + c, 32 + c, ... as fields of 2
or 4 bits. A field is the code minus the zero point of symmetric codes, in two's complement: moved
to the top of a byte it is a signed number, 4, 6 or 0 bits too large. INT8 codes stand in their
usual order, as signed bytes.

In every case the new layout is an ordinary `pack` of reordered codes. K is padded with zero codes
to a multiple of 128, so that rows of every plane begin at 16-byte addresses; nothing else grows.
With act-order, columns are sorted by group first and x is gathered to match; consecutive groups are
all that the kernels know."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmq_kernels.core.packing import pack, packed_width, unpack
from llmq_kernels.core.weight import PackedWeight

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}
K_MULTIPLE = 128
UNIT_COLUMNS = 32


def padded_columns(k: int) -> int:
    """K rounded up to what the kernels walk in."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE


@cache
def unit_order() -> tuple[int, ...]:
    """Which column of a block of 32 stands at each place: place `8 j + 4 c + 2 a + b` holds column
    `16 a + 8 b + 2 j + c`."""
    return tuple(
        16 * a + 8 * b + 2 * j + c
        for j in range(4)
        for c in range(2)
        for a in range(2)
        for b in range(2)
    )


@cache
def byte_order(bits: int) -> tuple[int, ...]:
    """Which column of a block of `128 / bits` stands at each place: field i of byte c holds column
    `16 i + c`."""
    fields = 8 // bits
    return tuple(16 * i + c for c in range(16) for i in range(fields))


def _reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    n, k = codes.shape
    index = torch.tensor(order, device=codes.device)
    return codes.view(n, k // len(order), len(order))[:, :, index].reshape(n, k)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def column_order(g_idx: Tensor) -> Tensor:
    """The columns sorted by group, int64 `[K]`: position -> column."""
    return torch.argsort(g_idx, stable=True)


def act_order_refusal(weight: PackedWeight) -> str | None:
    """Sorted by group, columns must form consecutive groups of the full size (only the last may be
    shorter)."""
    if weight.g_idx is None:
        return None
    k = weight.shape[1]
    counts = torch.bincount(weight.g_idx, minlength=weight.scale.shape[1])
    expected = torch.full_like(counts, weight.group_size)
    expected[-1] = k - weight.group_size * (len(counts) - 1)
    if not torch.equal(counts, expected):
        return (
            f"its act-order groups have {int(counts.min())} to {int(counts.max())} columns, not "
            f"{weight.group_size} each"
        )
    return None


def _codes(weight: PackedWeight) -> Tensor:
    """uint8 `[N, padded K]`, columns sorted by group."""
    n, k = weight.shape
    codes = unpack(weight.packed, weight.code.bits, k)
    if weight.g_idx is not None:
        codes = codes[:, column_order(weight.g_idx)]
    return torch.nn.functional.pad(codes, (0, padded_columns(k) - k)).view(n, padded_columns(k))


def _canonical(weight: PackedWeight, codes: Tensor) -> Tensor:
    codes = codes[:, : weight.shape[1]]
    if weight.g_idx is not None:
        original = torch.empty_like(codes)
        original[:, column_order(weight.g_idx)] = codes
        codes = original
    return pack(codes.contiguous(), weight.code.bits)


def pack_units(weight: PackedWeight) -> Tensor:
    """int32 `[N, packed_width(padded K, bits)]`: the planes of each row, one after the other."""
    codes = _reorder(_codes(weight), unit_order())
    parts, shift = [], 0
    for bits in PLANES[weight.code.bits]:
        parts.append(pack((codes >> shift) & ((1 << bits) - 1), bits))
        shift += bits
    return torch.cat(parts, dim=1)


def unpack_units(weight: PackedWeight, packed: Tensor) -> Tensor:
    """The canonical words from those of `pack_units`. weight: for its meaning only, its words are
    not read."""
    k = padded_columns(weight.shape[1])
    codes, start, shift = (
        torch.zeros(packed.shape[0], k, dtype=torch.uint8, device=packed.device),
        0,
        0,
    )
    for bits in PLANES[weight.code.bits]:
        width = packed_width(k, bits)
        codes |= unpack(packed[:, start : start + width], bits, k) << shift
        start, shift = start + width, shift + bits
    return _canonical(weight, _reorder(codes, _inverse(unit_order())))


def _signed(codes: Tensor, offset: int, bits: int) -> Tensor:
    """`codes + offset` modulo 2^bits."""
    return (codes + (offset & 255)) & ((1 << bits) - 1)


def pack_bytes(weight: PackedWeight) -> Tensor:
    """int32 `[N, packed_width(padded K, bits)]` for the integer product."""
    bits = weight.code.bits
    codes = _signed(_codes(weight), -int(weight.code.offset), bits)
    return pack(codes if bits == 8 else _reorder(codes, byte_order(bits)), bits)


def unpack_bytes(weight: PackedWeight, packed: Tensor) -> Tensor:
    """The canonical words from those of `pack_bytes`."""
    bits = weight.code.bits
    codes = unpack(packed, bits, padded_columns(weight.shape[1]))
    if bits < 8:
        codes = _reorder(codes, _inverse(byte_order(bits)))
    return _canonical(weight, _signed(codes, int(weight.code.offset), bits))


def transposed(values: Tensor, n: int) -> Tensor:
    """Scales or zero points `[N or 1, G]` as the kernels read them, `[G, N]`: a tile of rows reads
    neighbours."""
    return values.expand(n, -1).T.contiguous()
