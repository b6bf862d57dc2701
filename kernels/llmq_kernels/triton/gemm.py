"""Rows of x by tensor cores, with the weight as the left operand.

The product is computed transposed, `Y^T [BN, BM] = W [BN, BK] . X^T [BK, BM]`, because the left
operand of Hopper's `wgmma` may lie in registers while the right one may not. Dequantized numbers
then go straight from the unpacking instructions into the tensor core; in the usual orientation
every tile of W would have to be written to shared memory and read back. x, which is small and needs
no work, takes the way through shared memory.

BLOCK_K never crosses a group. Where scales go:
- Few rows of x: a tile's product of exact integers is multiplied by one float32 scale per row
  afterwards: no rounding of `scale * code`, but a second accumulator, and each tile waits for its
  products.
- Many rows (FOLD): the scale is multiplied into the weight, rounded once as where cuBLAS gets a
  dequantized weight, and all tiles add up in the tensor core, whose products stay in flight.
- One scale per row: all tiles add up in the tensor core and the scale waits for the end.
A tile's scales are read one tile ahead (a value carried by the loop): their loads are too narrow
for the asynchronous pipeline, and read where they are used each tile would wait for memory.

When there are fewer tiles than the chip has room for, K is split over several programs. Each writes
its partial sums to its own slice of a float32 workspace `[splits, M, N]`, and a second kernel adds
them in order. Atomic additions would save that launch and make results differ from run to run. From
Hopper on (EARLY) the second kernel is launched while the first one runs, and waits in the device
for its end: what a launch takes is hidden."""

import triton
import triton.language as tl

from llmq_kernels.triton.dequantize import plane_pointer, scaled_values, unit_values


@triton.jit
def product(weights, x_tile, total, UPCAST: tl.constexpr):
    """`total + weights [BN, BK] . x_tile [BM, BK]^T`. UPCAST: the interpreter cannot multiply
    bfloat16."""
    if UPCAST:
        return tl.dot(
            weights.to(tl.float32), tl.trans(x_tile).to(tl.float32), total, input_precision="ieee"
        )
    return tl.dot(weights, tl.trans(x_tile), total)


@triton.jit
def settled(total):
    """The same sums, once the tensor core has written them.

    Hopper's products run on while the program goes on. Triton 3.6 lets those of one tile run into
    the next tile when only they use the sums, although that tile's weights are unpacked into the
    registers which they still read: its own assembler either notices, and waits after each product
    (int4), or does not, and sums are wrong (ternary). A use of the sums within the loop makes
    Triton wait for them where the tile ends. The move itself is optimized away."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], tl.float32, True, 1)


@triton.jit
def store_tile(
    total, out, bias, rows, tokens, M, N, HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr
):
    """Store `[BN, BM]` transposed: into the output with the bias, or into this split's slice of the
    workspace."""
    if IS_SPLIT:
        out += tl.program_id(2).to(tl.int64) * M * N
    elif HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    at = out + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(
        at,
        tl.trans(total).to(out.dtype.element_ty),
        mask=(tokens < M)[:, None] & (rows < N)[None, :],
    )


@triton.jit
def split_range(tiles_k, split_tiles, IS_SPLIT: tl.constexpr, EARLY: tl.constexpr):
    """The tiles of K that this program walks along: all, or its share of them, and then with EARLY
    the kernel that adds the shares may be launched already."""
    first, last = 0, tiles_k
    if IS_SPLIT:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        first = tl.program_id(2) * split_tiles
        last = tl.minimum(first + split_tiles, tiles_k)
    return first, last


@triton.jit(do_not_specialize=["M", "split_tiles"])
def gemm_kernel(
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
    split_tiles,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
    EARLY: tl.constexpr,
    SETTLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x `[M, K]`, packed `[N, row_words]` with its second plane `high_words` into each row, scale
    and zero `[G, N]` (GROUP columns each; GROUP 0: one for the whole row), bias `[N]`, out `[M, N]`
    or the workspace. The grid is tiles of M, tiles of N, splits of K, each of split_tiles tiles and
    with its own slice of the workspace. BLOCK_K divides GROUP. FOLD: scales, float32 then, are
    multiplied into the weight (not with GROUP 0, where nothing is gained). EVEN_K: K needs no
    padding, so x needs no mask. SETTLE: see `settled`. UPCAST: see `product`."""
    # Programs that share rows of W are neighbours, so that W comes from device memory once.
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.where(rows < N, rows, 0)
    safe_tokens = tl.where(tokens < M, tokens, 0)
    tiles_k = K_padded // BLOCK_K
    first, last = split_range(tiles_k, split_tiles, IS_SPLIT, EARLY)

    units = tl.arange(0, BLOCK_K // 8)
    columns = tl.arange(0, BLOCK_K)
    low_units = plane_pointer(packed, row_words, safe_rows, 0, LOW_BITS) + units[None, :]
    high_units = plane_pointer(packed, row_words, safe_rows, high_words, HIGH_BITS) + units[None, :]
    x_columns = x + safe_tokens.to(tl.int64)[:, None] * K + columns[None, :]
    shift = tl.full((BLOCK_N, 1), OFFSET, tl.int32)
    if HAS_ZERO and GROUP == 0:
        shift = tl.load(zero + safe_rows)[:, None].to(tl.int32)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(first, last):
        k = tile * BLOCK_K
        if GROUP > 0:
            at = k // GROUP * N + safe_rows
            factor = tl.load(scale + at)[:, None].to(tl.float32)
            if HAS_ZERO:
                shift = tl.load(zero + at)[:, None].to(tl.int32)
        low = tl.load(low_units + k // 8)
        high = low
        if HIGH_BITS > 0:
            high = tl.load(high_units + k // 8)
        if not EVEN_K:
            x_tile = tl.load(x_columns + k, mask=(k + columns < K)[None, :], other=0.0)
        elif BLOCK_M == 16:
            # Rows beyond M would be fetched from the second cache for nothing.
            x_tile = tl.load(x_columns + k, mask=(tokens < M)[:, None], other=0.0)
        else:
            x_tile = tl.load(x_columns + k)
        if FOLD:
            numbers = scaled_values(
                low,
                high,
                shift,
                factor,
                x.dtype.element_ty,
                LOW_BITS,
                HIGH_BITS,
                USE_ASM,
            )
            total = product(numbers, x_tile, total, UPCAST)
            if SETTLE:
                total = settled(total)
        else:
            numbers = unit_values(
                low, high, shift, x.dtype.element_ty, LOW_BITS, HIGH_BITS, USE_ASM
            )
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
    store_tile(total, out, bias, rows, tokens, M, N, HAS_BIAS, IS_SPLIT)


@triton.jit(do_not_specialize=["size"])
def reduce_kernel(
    workspace,
    bias,
    out,
    size,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out `[M, N]`, `size` elements: the sum over the first dimension of workspace `[SPLIT_K, M,
    N]`, always in the same order, and the bias. EARLY: launched before the workspace is written."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for split in tl.static_range(SPLIT_K):
        total += tl.load(workspace + split * size.to(tl.int64) + at, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def dequantize_kernel(
    packed,
    scale,
    zero,
    out,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """out `[N, K]`: `scale * (code - zero)`, the product computed in float32 and rounded once."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.where(rows < N, rows, 0)
    k = tl.program_id(1) * BLOCK_K
    units = tl.arange(0, BLOCK_K // 8)
    columns = k + tl.arange(0, BLOCK_K)
    low = tl.load(
        plane_pointer(packed, row_words, safe_rows, 0, LOW_BITS) + k // 8 + units[None, :]
    )
    high = low
    if HIGH_BITS > 0:
        high = tl.load(
            plane_pointer(packed, row_words, safe_rows, high_words, HIGH_BITS)
            + k // 8
            + units[None, :]
        )
    at = safe_rows
    if GROUP > 0:
        at += k // GROUP * N
    shift = tl.full((BLOCK_N, 1), OFFSET, tl.int32)
    if HAS_ZERO:
        shift = tl.load(zero + at)[:, None].to(tl.int32)
    numbers = unit_values(low, high, shift, out.dtype.element_ty, LOW_BITS, HIGH_BITS, USE_ASM).to(
        tl.float32
    )
    numbers *= tl.load(scale + at).to(tl.float32)[:, None]
    tl.store(
        out + rows.to(tl.int64)[:, None] * K + columns[None, :],
        numbers.to(out.dtype.element_ty),
        mask=(rows < N)[:, None] & (columns < K)[None, :],
    )
