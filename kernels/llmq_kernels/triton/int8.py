"""Integer products: INT8 activations with one scale per token or one for all, weights of 2, 4 or 8
bits, int32 sums, one multiplication at the end.

Codes stay unsigned, so unpacking is a shift and an "and" on four bytes at once: `(w >> 2 i) &
0x03030303` gives four ternary codes ready for the tensor core. What the unsigned codes add is taken
out afterwards: `sum (q - z) x = sum q x - z sum x`, where the sums of x over each tile of columns
are made by the kernel that quantizes x. (INT8 codes are stored as `q - 128`, since the tensor core
multiplies signed bytes; their zero point moves along, and for symmetric ones nothing is left to
take out.)

Everything up to the scales is exact. The orientation is that of `triton/gemm`: the weight is the
left operand and stays in registers, and byte c of a block of 16 bytes holds columns c, 16 + c, ...,
which is how `wgmma` for bytes wants its left operand."""

import triton
import triton.language as tl

from llmq_kernels.triton.gemm import store_tile


@triton.jit
def store_codes(
    integers, codes, sums, token, k, K_padded, SUM_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store int32 `integers [BLOCK_K]` of one token from column k on, and their sums over every
    SUM_COLUMNS columns."""
    columns = k + tl.arange(0, BLOCK_K)
    tl.store(codes + token * K_padded + columns, integers.to(tl.int8), mask=columns < K_padded)
    tile_sums = tl.sum(integers.reshape(BLOCK_K // SUM_COLUMNS, SUM_COLUMNS), axis=1)
    tiles = k // SUM_COLUMNS + tl.arange(0, BLOCK_K // SUM_COLUMNS)
    tl.store(
        sums + token * (K_padded // SUM_COLUMNS) + tiles,
        tile_sums,
        mask=tiles < K_padded // SUM_COLUMNS,
    )


@triton.jit
def nearest(values):
    """float32 rounded to whole numbers, ties to even: adding and subtracting 1.5 * 2^23 rounds in
    float32's own mode, for magnitudes up to 2^22."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def quantize_tokens_kernel(
    x, codes, scale, sums, K, K_padded, SUM_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program per token: codes int8 `[M, K_padded]` (zero beyond K), scale float32 `[M]` with x
    = scale * code, sums int32 `[M, K_padded / SUM_COLUMNS]` of the codes.

    Division and rounding (to nearest, ties to even) are those of `reference.quantize_tokens`, so
    that both give the same codes."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        values = tl.load(
            x + token * K + k + columns,
            mask=k + columns < K,
            other=0.0,
            eviction_policy="evict_last",
        ).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    token_scale = tl.maximum(
        tl.div_rn(tl.max(largest, axis=0), 127.0), 1e-8, propagate_nan=tl.PropagateNan.ALL
    )
    tl.store(scale + token, token_scale)
    for k in range(0, K_padded, BLOCK_K):
        values = tl.load(x + token * K + k + columns, mask=k + columns < K, other=0.0).to(
            tl.float32
        )
        store_codes(
            nearest(tl.div_rn(values, token_scale)).to(tl.int32),
            codes,
            sums,
            token,
            k,
            K_padded,
            SUM_COLUMNS,
            BLOCK_K,
        )


@triton.jit
def quantize_static_kernel(
    x,
    input_range,
    codes,
    scale,
    sums,
    K,
    K_padded,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same with one scale and zero point z for all, input_range float32 `[2]`: x = scale *
    (code + 128 - z), rounded as by `reference.quantize_static`. Codes beyond K are zero."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    static_scale, zero = tl.load(input_range), tl.load(input_range + 1)
    tl.store(scale + token, static_scale)
    for k in range(0, K_padded, BLOCK_K):
        values = tl.load(x + token * K + k + columns, mask=k + columns < K, other=0.0).to(
            tl.float32
        )
        # Clamped before it is rounded: far beyond the range, `nearest` would not hold.
        steps = tl.minimum(tl.maximum(tl.div_rn(values, static_scale), -512.0), 512.0)
        shifted = tl.minimum(tl.maximum(nearest(steps) + zero, 0.0), 255.0) - 128.0
        store_codes(
            tl.where(k + columns < K, shifted, 0.0).to(tl.int32),
            codes,
            sums,
            token,
            k,
            K_padded,
            SUM_COLUMNS,
            BLOCK_K,
        )


@triton.jit
def byte_codes(packed, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    """int8 codes `[R, C]` in the order of the columns, from bytes `[R, C * BITS / 8]`."""
    rows: tl.constexpr = packed.shape[0]
    n_bytes: tl.constexpr = packed.shape[1]
    if BITS == 8:
        return packed
    elif BITS == 4:
        if USE_ASM:
            a, b = tl.inline_asm_elementwise(
                "and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;",
                "=&r,=&r,r",
                [packed],
                dtype=(tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            a, b = (packed & 15).to(tl.int8), ((packed >> 4) & 15).to(tl.int8)
        return (
            tl.join(a, b)
            .reshape(rows, n_bytes // 16, 16, 2)
            .permute(0, 1, 3, 2)
            .reshape(rows, n_bytes * 2)
        )
    else:
        if USE_ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                "and.b32 $0, $4, 0x03030303; shr.u32 $1, $4, 2; and.b32 $1, $1, 0x03030303; "
                "shr.u32 $2, $4, 4; and.b32 $2, $2, 0x03030303; shr.u32 $3, $4, 6; and.b32 $3, "
                "$3, 0x03030303;",
                "=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            a, b = (packed & 3).to(tl.int8), ((packed >> 2) & 3).to(tl.int8)
            c, d = ((packed >> 4) & 3).to(tl.int8), ((packed >> 6) & 3).to(tl.int8)
        joined = tl.join(tl.join(a, c), tl.join(b, d))
        return (
            joined.reshape(rows, n_bytes // 16, 16, 4)
            .permute(0, 1, 3, 2)
            .reshape(rows, n_bytes * 4)
        )


@triton.jit(do_not_specialize=["M"])
def int8_gemm_kernel(
    x,
    x_scale,
    x_sums,
    packed,
    scale,
    zero,
    bias,
    out,
    M,
    N,
    K_padded,
    row_words,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """x int8 `[M, K_padded]`, x_scale float32 `[M]`, x_sums int32 `[M, K_padded / BLOCK_K]`, packed
    `[N, row_words]`, scale and zero `[G, N]`, out `[M, N]` or the workspace.

    OFFSET: the zero point of symmetric codes as stored. BLOCK_K divides GROUP (0: one scale per
    row)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    rows = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.where(rows < N, rows, 0)
    safe_tokens = tl.where(tokens < M, tokens, 0).to(tl.int64)
    tiles_k = K_padded // BLOCK_K
    first = tl.program_id(1) * tiles_k // SPLIT_K
    last = (tl.program_id(1) + 1) * tiles_k // SPLIT_K

    byte_columns = tl.arange(0, BLOCK_K * BITS // 8)
    pointers = (packed + safe_rows.to(tl.int64)[:, None] * row_words).to(
        tl.pointer_type(tl.int8), bitcast=True
    ) + byte_columns[None, :]
    x_columns = x + safe_tokens[:, None] * K_padded + tl.arange(0, BLOCK_K)[None, :]
    shifts: tl.constexpr = HAS_ZERO or OFFSET != 0
    # INT8 codes are stored 128 lower than they are; stored zero points are not.
    moved: tl.constexpr = 128 if BITS == 8 else 0
    shift = tl.full((BLOCK_N,), OFFSET, tl.int32)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    integers = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    row_sums = tl.zeros((BLOCK_M,), tl.int32)
    for tile in range(first, last):
        codes = byte_codes(tl.load(pointers + tile * (BLOCK_K * BITS // 8)), BITS, USE_ASM)
        x_tile = tl.load(x_columns + tile * BLOCK_K)
        if GROUP > 0:
            at = tile * BLOCK_K // GROUP * N + safe_rows
            product = tl.dot(codes, tl.trans(x_tile), out_dtype=tl.int32)
            if shifts:
                if HAS_ZERO:
                    shift = tl.load(zero + at).to(tl.int32) - moved
                product -= shift[:, None] * tl.load(x_sums + safe_tokens * tiles_k + tile)[None, :]
            total += product.to(tl.float32) * tl.load(scale + at).to(tl.float32)[:, None]
        else:
            integers = tl.dot(codes, tl.trans(x_tile), integers, out_dtype=tl.int32)
            if shifts:
                row_sums += tl.load(x_sums + safe_tokens * tiles_k + tile)
    if GROUP == 0:
        if shifts:
            if HAS_ZERO:
                shift = tl.load(zero + safe_rows).to(tl.int32) - moved
            integers -= shift[:, None] * row_sums[None, :]
        total = integers.to(tl.float32) * tl.load(scale + safe_rows).to(tl.float32)[:, None]
    total *= tl.load(x_scale + safe_tokens)[None, :]
    store_tile(total, out, bias, rows, tokens, M, N, HAS_BIAS, SPLIT_K)
