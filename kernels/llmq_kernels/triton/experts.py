"""The experts of a module in one launch (`experts_kernel`), or the first two layers of each with
what stands between them and the third (`gated_kernel`).

Rows of x are sorted by expert, and a program owns a tile of rows of one expert by a tile of its
outputs. Which expert that is, and which rows, stand in a table that the host side makes on the
device, so nothing waits for the routing to be known: there are as many programs as the worst
routing needs, and those without a tile end at once.

Experts are weights of their own, each where it was allocated. The kernel is given the first, and
for each how many elements further its tensors begin. That needs no second copy of the words, and
loads keep the alignment that the compiler knows of the first. The product is that of
`triton/gemm`, with scales applied to sums."""

import triton
import triton.language as tl

from llmq_kernels.triton.dequantize import plane_pointer, unit_values
from llmq_kernels.triton.gemm import product, settled, store_tile


@triton.jit
def tile_of(tiles, n_experts, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's expert (E: none), its sorted rows and where the expert's end, its outputs."""
    tile = tiles + tl.program_id(0) * 3
    tokens = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(tile), tokens, tl.load(tile + 2), rows


@triton.jit
def expert_sums(
    x,
    x_rows,
    tokens,
    end,
    packed,
    scale,
    zero,
    distances,
    expert,
    n_experts,
    rows,
    N,
    K,
    K_padded,
    row_words,
    high_words,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
    SETTLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The product of an expert's weight with rows of x, float32 `[BN, BM]`. packed, scale, zero: of
    the first expert. Biases are left to the kernels: added here, registers spill on sm_89."""
    safe_rows = tl.where(rows < N, rows, 0)
    # Multiples of 16 bytes, as allocations are.
    packed += tl.multiple_of(tl.load(distances + expert), 4)
    scale += tl.load(distances + n_experts + expert)
    if HAS_ZERO:
        zero += tl.load(distances + 2 * n_experts + expert)

    units = tl.arange(0, BLOCK_K // 8)
    columns = tl.arange(0, BLOCK_K)
    low_units = plane_pointer(packed, row_words, safe_rows, 0, LOW_BITS) + units[None, :]
    high_units = plane_pointer(packed, row_words, safe_rows, high_words, HIGH_BITS) + units[None, :]
    x_columns = x + x_rows[:, None] * K + columns[None, :]
    shift = tl.full((BLOCK_N, 1), OFFSET, tl.int32)
    if HAS_ZERO and GROUP == 0:
        shift = tl.load(zero + safe_rows)[:, None].to(tl.int32)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K_padded, BLOCK_K):
        if GROUP > 0:
            at = k // GROUP * N + safe_rows
            factor = tl.load(scale + at)[:, None].to(tl.float32)
            if HAS_ZERO:
                shift = tl.load(zero + at)[:, None].to(tl.int32)
        low = tl.load(low_units + k // 8)
        high = low
        if HIGH_BITS > 0:
            high = tl.load(high_units + k // 8)
        if EVEN_K:
            x_tile = tl.load(x_columns + k, mask=(tokens < end)[:, None], other=0.0)
        else:
            inside = (tokens < end)[:, None] & (k + columns < K)[None, :]
            x_tile = tl.load(x_columns + k, mask=inside, other=0.0)
        numbers = unit_values(low, high, shift, x.dtype.element_ty, LOW_BITS, HIGH_BITS, USE_ASM)
        if GROUP > 0:
            integers = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            integers = product(numbers, x_tile, integers, UPCAST)
            total += integers * factor
        else:
            total = product(numbers, x_tile, total, UPCAST)
            if SETTLE:
                total = settled(total)
    if GROUP == 0:
        total *= tl.load(scale + safe_rows).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["n_experts"])
def experts_kernel(
    x,
    packed,
    scale,
    zero,
    bias,
    out,
    distances,
    source,
    tiles,
    n_experts,
    N,
    K,
    K_padded,
    row_words,
    high_words,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
    SETTLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x `[T, K]`, packed, scale, zero, bias: of the first expert, as `gemm_kernel` has them.
    distances: int64 `[4, E]`, elements from these to those of each expert. source: int64 `[M]`, the
    row of x that each sorted row is. tiles: int32 `[tiles, 3]`: expert (E: none), first row and end
    of the expert's rows. out `[M, N]`. The grid is tiles, tiles of N."""
    expert, tokens, end, rows = tile_of(tiles, n_experts, N, BLOCK_M, BLOCK_N)
    if expert >= n_experts:
        return
    x_rows = tl.load(source + tokens, mask=tokens < end, other=0)
    total = expert_sums(
        *(x, x_rows, tokens, end, packed, scale, zero, distances),
        *(expert, n_experts, rows, N, K, K_padded, row_words, high_words),
        *(GROUP, OFFSET, HAS_ZERO, LOW_BITS, HIGH_BITS),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, USE_ASM, SETTLE, UPCAST),
    )
    if HAS_BIAS:
        bias += tl.load(distances + 3 * n_experts + expert)
    store_tile(total, out, bias, rows, tokens, end, N, HAS_BIAS, False)


@triton.jit
def activated(gate, IS_GELU: tl.constexpr):
    """SiLU, or GELU in its form with tanh: `(1 + tanh(y)) / 2` is `sigmoid(2 y)`."""
    if IS_GELU:
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return gate * tl.sigmoid(gate)


@triton.jit(do_not_specialize=["n_experts"])
def gated_kernel(
    x,
    gate_packed,
    gate_scale,
    gate_zero,
    gate_bias,
    gate_distances,
    packed,
    scale,
    zero,
    bias,
    distances,
    out,
    source,
    tiles,
    n_experts,
    N,
    K,
    K_padded,
    row_words,
    high_words,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
    SETTLE: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_GELU: tl.constexpr,
):
    """`activation(gate(x)) * up(x)`, `[M, N]`: arguments as in `experts_kernel`, those of the gates
    first. Gates are multiplied first, then up; nothing of them is rounded or stored between."""
    expert, tokens, end, rows = tile_of(tiles, n_experts, N, BLOCK_M, BLOCK_N)
    if expert >= n_experts:
        return
    x_rows = tl.load(source + tokens, mask=tokens < end, other=0)
    gate = expert_sums(
        *(x, x_rows, tokens, end, gate_packed, gate_scale, gate_zero, gate_distances),
        *(expert, n_experts, rows, N, K, K_padded, row_words, high_words),
        *(GROUP, OFFSET, HAS_ZERO, LOW_BITS, HIGH_BITS),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, USE_ASM, SETTLE, UPCAST),
    )
    if HAS_BIAS:
        gate_bias += tl.load(gate_distances + 3 * n_experts + expert)
        gate += tl.load(gate_bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    total = expert_sums(
        *(x, x_rows, tokens, end, packed, scale, zero, distances),
        *(expert, n_experts, rows, N, K, K_padded, row_words, high_words),
        *(GROUP, OFFSET, HAS_ZERO, LOW_BITS, HIGH_BITS),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, USE_ASM, SETTLE, UPCAST),
    )
    if HAS_BIAS:
        bias += tl.load(distances + 3 * n_experts + expert)
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    total *= activated(gate, IS_GELU)
    store_tile(total, out, bias, rows, tokens, end, N, False, False)
