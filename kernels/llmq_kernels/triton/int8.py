"""Integer products: INT8 activations with one scale per token or one for all, weights of 2, 4 or 8
bits, int32 sums, one multiplication at the end.

Codes are stored less the zero point of symmetric codes, as signed fields, and stay at the top of
their bytes: `(w << 4) & 0xF0F0F0F0` gives four signed numbers, 16 times too large, ready for the
tensor core. The power of two leaves with the scale, exactly. Symmetric codes need nothing else; of
others `sum (q - z) x = sum q x - z sum x` with z less that zero point, and the sums of x over each
tile of columns are made by the kernel that quantizes x.

Everything up to the scales is exact. The orientation is that of `triton/gemm`: the weight is the
left operand and stays in registers, and byte c of a block of 16 bytes holds columns c, 16 + c, ...,
which is how `wgmma` for bytes wants its left operand."""

import triton
import triton.language as tl

from llmq_kernels.triton.gemm import split_range, store_tile


@triton.jit
def store_codes(
    integers,
    codes,
    sums,
    token,
    k,
    K_padded,
    HAS_SUMS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store int32 `integers [BLOCK_K]` of one token from column k on, and their sums over every
    SUM_COLUMNS columns."""
    columns = k + tl.arange(0, BLOCK_K)
    tl.store(codes + token * K_padded + columns, integers.to(tl.int8), mask=columns < K_padded)
    if HAS_SUMS:
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
def token_scale_of(largest):
    """The scale of a token from its largest magnitude, as `reference.quantize_tokens` has it."""
    return tl.maximum(tl.div_rn(largest, 127.0), 1e-8, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def token_values(x, token, k, K, BLOCK_K: tl.constexpr):
    """float32 `[BLOCK_K]` from column k on, 0 beyond K."""
    columns = k + tl.arange(0, BLOCK_K)
    at = x + token * K + columns
    return tl.load(at, mask=columns < K, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def quantize_tokens_kernel(
    x,
    codes,
    scale,
    sums,
    K,
    K_padded,
    AT_ONCE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per token: codes int8 `[M, K_padded]` (zero beyond K), scale float32 `[M]` with x
    = scale * code, and where HAS_SUMS sums int32 `[M, K_padded / SUM_COLUMNS]` of the codes.
    AT_ONCE: a block holds the whole token, which is then read once. EARLY: the product may be
    launched already.

    Division and rounding (to nearest, ties to even) are those of `reference.quantize_tokens`, so
    that both give the same codes."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    if AT_ONCE:
        values = token_values(x, token, 0, K, BLOCK_K)
        largest = tl.maximum(largest, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
        token_scale = token_scale_of(tl.max(largest, axis=0))
        integers = nearest(tl.div_rn(values, token_scale)).to(tl.int32)
        store_codes(integers, codes, sums, token, 0, K_padded, HAS_SUMS, SUM_COLUMNS, BLOCK_K)
    else:
        for k in range(0, K, BLOCK_K):
            values = token_values(x, token, k, K, BLOCK_K)
            largest = tl.maximum(largest, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
        token_scale = token_scale_of(tl.max(largest, axis=0))
        for k in range(0, K_padded, BLOCK_K):
            values = token_values(x, token, k, K, BLOCK_K)
            integers = nearest(tl.div_rn(values, token_scale)).to(tl.int32)
            store_codes(integers, codes, sums, token, k, K_padded, HAS_SUMS, SUM_COLUMNS, BLOCK_K)
    tl.store(scale + token, token_scale)


@triton.jit
def quantize_static_kernel(
    x,
    input_range,
    codes,
    scale,
    sums,
    K,
    K_padded,
    HAS_SUMS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The same with one scale and zero point z for all, input_range float32 `[2]`: x = scale *
    (code + 128 - z), rounded as by `reference.quantize_static`. Codes beyond K are zero."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
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
            HAS_SUMS,
            SUM_COLUMNS,
            BLOCK_K,
        )


@triton.constexpr_function
def _fields(bits):
    """PTX that moves each field of four bytes to the top of a byte of its own."""
    n_fields = 8 // bits
    mask = 0x01010101 * (256 - (1 << (8 - bits)))
    return " ".join(
        f"shl.b32 ${i}, ${n_fields}, {8 - bits * (i + 1)}; and.b32 ${i}, ${i}, {mask:#x};"
        for i in range(n_fields)
    )


@triton.jit
def _field(packed, LEFT: tl.constexpr, MASK: tl.constexpr):
    return ((packed.to(tl.int32) << LEFT) & MASK).to(tl.int8)


@triton.jit
def byte_codes(packed, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    """Signed codes times 2^(8 - BITS), int8 `[R, C]` in the order of the columns, from bytes `[R, C
    * BITS / 8]`."""
    rows: tl.constexpr = packed.shape[0]
    n_bytes: tl.constexpr = packed.shape[1]
    if BITS == 8:
        return packed
    elif BITS == 4:
        if USE_ASM:
            a, b = tl.inline_asm_elementwise(
                _fields(4), "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            a, b = _field(packed, 4, 0xF0), _field(packed, 0, 0xF0)
        return (
            tl.join(a, b)
            .reshape(rows, n_bytes // 16, 16, 2)
            .permute(0, 1, 3, 2)
            .reshape(rows, n_bytes * 2)
        )
    else:
        if USE_ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                _fields(2),
                "=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            a, b = _field(packed, 6, 0xC0), _field(packed, 4, 0xC0)
            c, d = _field(packed, 2, 0xC0), _field(packed, 0, 0xC0)
        joined = tl.join(tl.join(a, c), tl.join(b, d))
        return (
            joined.reshape(rows, n_bytes // 16, 16, 4)
            .permute(0, 1, 3, 2)
            .reshape(rows, n_bytes * 4)
        )


@triton.jit(do_not_specialize=["M", "split_tiles"])
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
    split_tiles,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    USE_ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x int8 `[M, K_padded]`, x_scale float32 `[M]`, x_sums int32 `[M, K_padded / BLOCK_K]` (read
    where HAS_ZERO), packed `[N, row_words]`, scale and zero `[G, N]`, out `[M, N]` or the
    workspace. The grid is that of `triton/gemm`.

    OFFSET: the zero point of symmetric codes, which stored codes lack. BLOCK_K divides GROUP (0:
    one scale per row). EARLY: launched before x is written."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.where(rows < N, rows, 0)
    safe_tokens = tl.where(tokens < M, tokens, 0).to(tl.int64)
    tiles_k = K_padded // BLOCK_K
    first, last = split_range(tiles_k, split_tiles, IS_SPLIT, EARLY)
    # Stored codes are multiplied where they lie, at the top of a byte.
    too_large: tl.constexpr = 1 << (8 - BITS)

    byte_columns = tl.arange(0, BLOCK_K * BITS // 8)
    pointers = (packed + safe_rows.to(tl.int64)[:, None] * row_words).to(
        tl.pointer_type(tl.int8), bitcast=True
    ) + byte_columns[None, :]
    x_columns = x + safe_tokens[:, None] * K_padded + tl.arange(0, BLOCK_K)[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    integers = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    row_sums = tl.zeros((BLOCK_M,), tl.int32)
    for tile in range(first, last):
        codes = byte_codes(tl.load(pointers + tile * (BLOCK_K * BITS // 8)), BITS, USE_ASM)
        if BLOCK_M == 16:
            # Rows beyond M would be fetched from the second cache for nothing.
            x_tile = tl.load(x_columns + tile * BLOCK_K, mask=(tokens < M)[:, None], other=0)
        else:
            x_tile = tl.load(x_columns + tile * BLOCK_K)
        if GROUP > 0:
            at = tile * BLOCK_K // GROUP * N + safe_rows
            product = tl.dot(codes, tl.trans(x_tile), out_dtype=tl.int32)
            if HAS_ZERO:
                shift = (tl.load(zero + at).to(tl.int32) - OFFSET) * too_large
                product -= shift[:, None] * tl.load(x_sums + safe_tokens * tiles_k + tile)[None, :]
            total += product.to(tl.float32) * tl.load(scale + at).to(tl.float32)[:, None]
        else:
            integers = tl.dot(codes, tl.trans(x_tile), integers, out_dtype=tl.int32)
            if HAS_ZERO:
                row_sums += tl.load(x_sums + safe_tokens * tiles_k + tile)
    if GROUP == 0:
        if HAS_ZERO:
            shift = (tl.load(zero + safe_rows).to(tl.int32) - OFFSET) * too_large
            integers -= shift[:, None] * row_sums[None, :]
        total = integers.to(tl.float32) * tl.load(scale + safe_rows).to(tl.float32)[:, None]
    total *= (tl.load(x_scale + safe_tokens) * (1 / too_large))[None, :]
    store_tile(total, out, bias, rows, tokens, M, N, HAS_BIAS, IS_SPLIT)
