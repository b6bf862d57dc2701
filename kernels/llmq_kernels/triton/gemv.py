"""Few rows of x (M <= 4): no tensor cores, one pass over the packed weight at the speed of memory.

A program owns BLOCK_N rows of W and walks along all of K, BLOCK_K codes at a time. A thread reads
whole 16-byte pieces of a row, and all codes of a block of 32 columns lie in one thread, so the sum
over a block needs no exchange: it is multiplied by its group's scale and added to a float32
accumulator `[M, BLOCK_N, BLOCK_K / 32]`. Threads meet once, in `tl.sum` at the end. Each output is
written by one program: nothing is atomic, and the order of additions is fixed.

x is read by every program, so it should stay in the cache (`evict_last`); a word of W is read once
in the whole launch (`evict_first`)."""

import triton
import triton.language as tl

from llmq_kernels.triton.dequantize import plane_pointer, unit_numbers


@triton.jit
def load_where(pointers, ok, POLICY: tl.constexpr, EVEN: tl.constexpr):
    """What the pointers point to, 0 where not ok. EVEN: all is ok. A mask, even one that is always
    true, cuts a load of 16 bytes into four."""
    if EVEN:
        return tl.load(pointers, eviction_policy=POLICY)
    else:
        return tl.load(pointers, mask=ok, other=0, eviction_policy=POLICY)


@triton.jit
def _block_sums(numbers, x_pointers, x_ok, EVEN: tl.constexpr):
    """`[BLOCK_N, BLOCKS]`: each block of 32 numbers times the x they meet, from numbers `[BLOCK_N,
    BLOCKS, 32]` and pointers `[BLOCKS, 32]` into one row of x."""
    x = load_where(x_pointers, x_ok, "evict_last", EVEN).to(tl.float32)
    return tl.sum(numbers * x[None, :, :], axis=2)


@triton.jit
def _finish(
    total, token, out, scale, bias, rows, M, N, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Add up over the threads, apply what belongs to whole rows, and store one row of the
    output."""
    y = tl.sum(total, axis=1)
    if GROUP == 0:
        y *= tl.load(scale + rows, mask=rows < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(
        out + token * N + rows, y.to(out.dtype.element_ty), mask=rows < tl.where(M > token, N, 0)
    )


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x,
    packed,
    scale,
    zero,
    bias,
    out,
    M,
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
):
    """x `[M, K]`, packed `[N, row_words]` with its second plane `high_words` into each row, scale
    and zero `[G, N]` (GROUP columns each; GROUP 0: one for the whole row), bias `[N]`, out `[M,
    N]`. EVEN_K: BLOCK_K divides K, so nothing needs a mask for its columns."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    safe_rows = tl.where(row_ok, rows, 0)
    BLOCKS: tl.constexpr = BLOCK_K // 32
    blocks = tl.arange(0, BLOCKS)
    units = tl.arange(0, BLOCK_K // 8)
    low_units = plane_pointer(packed, row_words, safe_rows, 0, LOW_BITS) + units[None, :]
    high_units = plane_pointer(packed, row_words, safe_rows, high_words, HIGH_BITS) + units[None, :]
    # 8 * unit + 2 * pair + half: the order in which a block is stored, and the column that stands
    # there.
    index = tl.arange(0, 32)
    columns = (blocks * 32)[:, None] + (index % 8 // 2 * 8 + index // 8 * 2 + index % 2)[None, :]

    # One accumulator per token, by name: a fourth dimension would make the compiler spread the
    # numbers of a block over many threads.
    total0 = tl.zeros((BLOCK_N, BLOCKS), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for k in range(0, K_padded, BLOCK_K):
        unit_ok = (k + units * 8 < K_padded)[None, :]
        low = load_where(low_units + k // 8, unit_ok, "evict_first", EVEN_K)
        high = low
        if HIGH_BITS > 0:
            high = load_where(high_units + k // 8, unit_ok, "evict_first", EVEN_K)
        block_ok = (k + blocks * 32 < K_padded)[None, :]
        at = (blocks * 0)[None, :] + safe_rows[:, None]
        if GROUP > 0:
            at += ((k + blocks * 32) // GROUP)[None, :] * N
        shift = tl.full((BLOCK_N, 1), OFFSET, tl.int32)
        if HAS_ZERO:
            shift = load_where(zero + at, block_ok, "", EVEN_K).to(tl.int32)
            shift = tl.broadcast_to(shift[:, :, None], (BLOCK_N, BLOCKS, 4)).reshape(
                BLOCK_N, BLOCKS * 4
            )
        numbers = (
            unit_numbers(low, high, shift, x.dtype.element_ty, LOW_BITS, HIGH_BITS, USE_ASM)
            .to(tl.float32)
            .reshape(BLOCK_N, BLOCKS, 32)
        )
        factor = tl.full((BLOCK_N, 1), 1.0, tl.float32)
        if GROUP > 0:
            factor = load_where(scale + at, block_ok, "", EVEN_K).to(tl.float32)
        at_columns = k + columns
        pointers = x + k + columns
        total0 += _block_sums(numbers, pointers, at_columns < K, EVEN_K) * factor
        # Rows beyond M read row 0, and `_finish` does not store them.
        if BLOCK_M > 1:
            pointers1 = pointers + tl.where(M > 1, K, 0)
            total1 += _block_sums(numbers, pointers1, at_columns < K, EVEN_K) * factor
        if BLOCK_M > 2:
            pointers2 = pointers + tl.where(M > 2, 2 * K, 0)
            total2 += _block_sums(numbers, pointers2, at_columns < K, EVEN_K) * factor
            pointers3 = pointers + tl.where(M > 3, 3 * K, 0)
            total3 += _block_sums(numbers, pointers3, at_columns < K, EVEN_K) * factor
    _finish(total0, 0, out, scale, bias, rows, M, N, GROUP, HAS_BIAS)
    if BLOCK_M > 1:
        _finish(total1, 1, out, scale, bias, rows, M, N, GROUP, HAS_BIAS)
    if BLOCK_M > 2:
        _finish(total2, 2, out, scale, bias, rows, M, N, GROUP, HAS_BIAS)
        _finish(total3, 3, out, scale, bias, rows, M, N, GROUP, HAS_BIAS)
