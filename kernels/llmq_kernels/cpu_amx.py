"""Packed weights times bfloat16 activations on the tile unit (AMX) of recent Xeons.

`Y^T = W X^T`: a tile holds 16 rows of W by 32 columns, expanded from packed codes into a buffer in the first-level cache, and meets a tile of X^T, 32 columns by 16 tokens, in 16 cycles. Expanding
those 512 weights takes about 24: the table of the group's 4, 8 or 16 possible values, `bfloat16(scale * (code - zero))`, lies in a register, and one permutation looks up 32 of them. So two tiles
of tokens cost about as much as one, from there on the tile unit is the limit, and no bfloat16 weight is ever read from memory, which is what a bfloat16 GEMM spends its time with at few tokens.

Blocking: 32 rows x 512 columns of W are expanded at a time (32 KB) and used for all tokens of the call; an item of work is some bands of rows, whose sums stay in the second-level cache between the
steps along K. 8-bit codes become bfloat16 values as they are and rows are scaled at the end.
"""

from __future__ import annotations

from llmq_kernels.cpu_layout import Layout
from llmq_kernels.emit import BF16, F32, I1, I8, I16, I32, I64, VOID, Emitter, Value, vector

AHEAD = 4096  # bytes of codes to fetch ahead of their use
TILE = 1024  # bytes
GEMM_ARGUMENTS = ("codes", "scale", "shift", "tiles", "out", "n", "m", "n_bands", "bands_per_item", "n_blocks", "n_groups", "columns_per_group")
PACK_ARGUMENTS = ("x", "tiles", "m", "n_chunks", "row_bytes")


def tile(e: Emitter, name: str, *operands: int | Value) -> None:
    """A tile instruction; tile numbers are immediates."""
    e.call(f"llvm.x86.{name}", VOID, *(e.constant(I8, value) if isinstance(value, int) else value for value in operands))


def configure(e: Emitter) -> None:
    """All eight tiles with 16 rows of 64 bytes."""
    config = e.buffer(64)
    e.store(e.constant(vector(I8, 64), [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8), config)
    tile(e, "ldtilecfg", config)


def transpose(e: Emitter, rows: list[Value]) -> list[Value]:
    """16 vectors of 16 lanes, transposed in four rounds of exchanging blocks between rows."""
    for width in (8, 4, 2, 1):
        low = [(lane // width % 2) * 16 + lane // (2 * width) * 2 * width + lane % width for lane in range(16)]
        high = [lane + width for lane in low]
        after = list(rows)
        for i in range(16):
            if i // width % 2 == 0:
                after[i], after[i + width] = rows[i].shuffle(low, rows[i + width]), rows[i].shuffle(high, rows[i + width])
        rows = after
    return rows


def pack_kernel() -> str:
    """Activations bfloat16 `[m, k]` as tiles `[token tiles, k / 32, 16, 16, 2]` in the order of columns in which weights are expanded: even ones of each 64, then odd ones, in pairs. Tokens that
    pad the last tile repeat the last token; nobody reads their sums."""
    e = Emitter(PACK_ARGUMENTS)
    x, tiles, m, n_chunks, row_bytes = e.pointer("x"), e.pointer("tiles"), e.argument("m"), e.argument("n_chunks"), e.argument("row_bytes")
    words = vector(I32, 16)
    with e.share((m + 15) // 16) as token_tile, e.loop(0, n_chunks) as chunk:
        even, odd = [], []
        for i in range(16):
            token = token_tile * 16 + i
            row = e.select(token.less(m), token, m - 1) * row_bytes + chunk * 128
            first, second = e.load(words, x, row), e.load(words, x, row + 64)
            a, b = first.shuffle(list(range(0, 32, 2)), second), first.shuffle(list(range(1, 32, 2)), second)
            even.append((a & 0xFFFF) | (b << 16))
            odd.append((a >> 16) | (b & 0xFFFF0000))
        target = (token_tile * n_chunks + chunk) * (2 * TILE)
        for offset, rows in ((0, even), (TILE, odd)):
            for r, row in enumerate(transpose(e, rows)):
                e.store(row, tiles, target + (offset + 64 * r), align=64)
    return e.finish()


# --- expanding codes to bfloat16 ------------------------------------------------------------------------------------------


def table(e: Emitter, bits: int, scale: Value, shift: Value | None, offset: int) -> Value:
    """The values of all codes of a group as 16 bfloat16 lanes: `scale * code + shift`, or `scale * (code - offset)`. Codes of fewer than 4 bits repeat, so that bits above them do not matter."""
    floats = vector(F32, 16)
    codes = [lane % (1 << bits) for lane in range(16)]
    if shift is None:
        values = e.constant(floats, [float(code - offset) for code in codes]) * e.splat(scale, 16)
    else:
        values = e.fma(e.constant(floats, [float(code) for code in codes]), e.splat(scale, 16), e.splat(shift, 16))
    return values.to("fptrunc", vector(BF16, 16)).cast(vector(I16, 16))


def _indices(e: Emitter, bits: int, block: Value, row: Value, chunk: int) -> tuple[Value, Value]:
    """The 64 codes of a chunk of one row as 2 x 32 table indices, those of even columns and those of odd ones. What lies above the code's bits is arbitrary."""
    low = e.load(vector(I16, 32), block, row * 64)
    if bits != 3:
        return low >> (bits * chunk), low >> (bits * chunk + 8)
    high = e.load(vector(I1, 64), block, row * 32 + (16 * 64 + 8 * chunk))
    bytes64 = vector(I8, 64)
    codes = ((low >> (2 * chunk)) & 0x0303).cast(bytes64) | e.select(high, e.constant(bytes64, 4), e.constant(bytes64, 0))
    indices = codes.cast(vector(I16, 32))
    return indices, indices >> 8


class Expander:
    """Writes a band's block as tiles: 16 rows x 32 columns of bfloat16 each."""

    def __init__(self, e: Emitter, bits: int, group: int, asymmetric: bool, offset: int) -> None:
        self.e, self.bits, self.group, self.asymmetric, self.offset = e, bits, group, asymmetric, offset
        self.scale, self.shift = e.pointer("scale"), e.pointer("shift")
        self.columns_per_group, self.n_groups = e.argument("columns_per_group"), e.argument("n_groups")

    def _table(self, band: Value, column: Value, row: Value) -> Value:
        """The table of the group that a column of a row is in."""
        place = ((band * self.n_groups + column // self.columns_per_group) * 16 + row) * 4
        shift = self.e.load(F32, self.shift, place, align=4) if self.asymmetric else None
        return table(self.e, self.bits, self.e.load(F32, self.scale, place, align=4), shift, self.offset)

    def row(self, block: Value, band: Value, column: Value, row: Value, target: Value) -> None:
        """One row of a block. block: address of its codes; column: its first column; target: address of its tiles."""
        e, fields = self.e, Layout(self.bits, 1, 1).fields
        e.prefetch(block, row * 64 + AHEAD)
        values = e.constant(vector(I16, 32), 0)
        for chunk in range(fields):
            if chunk * 64 % self.group == 0 and self.bits != 8:
                values = self._tables(band, column + chunk * 64, row)
            pair = self._integers(block, row) if self.bits == 8 else self._looked_up(values, _indices(e, self.bits, block, row, chunk))
            for i, expanded in enumerate(pair):
                e.store(expanded, target, row * 64 + (2 * chunk + i) * TILE, align=64)

    def _tables(self, band: Value, column: Value, row: Value) -> Value:
        """32 entries: the group's table twice, or those of two groups of 32."""
        first = self._table(band, column, row)
        return first.shuffle(list(range(32)), self._table(band, column + 32, row)) if self.group == 32 else first.shuffle(list(range(16)) * 2)

    def _looked_up(self, values: Value, pair: tuple[Value, Value]) -> list[Value]:
        indices = [self._within_half(one) if self.group == 32 else one for one in pair]
        return [self.e.call("llvm.x86.avx512.permvar.hi.512", vector(I16, 32), values, one) for one in indices]

    def _within_half(self, indices: Value) -> Value:
        """The upper 16 lanes belong to the next group of 32, whose values are the upper 16 of the table."""
        return (indices & 15) | self.e.constant(vector(I16, 32), [0] * 16 + [16] * 16)

    def _integers(self, block: Value, row: Value) -> tuple[Value, Value]:
        """64 codes of 8 bits, `code - 128` as bfloat16: an integer of 8 bits is exact there, so the upper half of its float32 is it."""
        words = self.e.load(vector(I32, 16), block, row * 64) ^ 0x80808080
        a, b, c, d = ((words << (24 - 8 * byte)).sar(24).to("sitofp", vector(F32, 16)).cast(vector(I32, 16)) for byte in range(4))
        halves = ((a >> 16) | (c & 0xFFFF0000), (b >> 16) | (d & 0xFFFF0000))
        return halves[0].cast(vector(I16, 32)), halves[1].cast(vector(I16, 32))


# --- the product ----------------------------------------------------------------------------------------------------------


class Product:
    """32 rows of W times 16 or 32 tokens: sums stay in tiles 0 to 3 along all of K, while the vector unit expands block i + 1 the tile unit multiplies with block i."""

    def __init__(self, e: Emitter, bits: int, expander: Expander) -> None:
        self.e, self.expander, self.layout = e, expander, Layout(bits, 1, 1)
        self.tiles_per_block = self.layout.columns // 32
        self.half_bytes = self.tiles_per_block * TILE  # of one band's block, expanded
        self.buffer, self.sums = e.buffer(4 * self.half_bytes), e.buffer(4 * TILE)
        self.n_blocks, self.line = e.argument("n_blocks"), e.constant(I64, 64)

    def __call__(self, n_tokens: int, band: Value, tokens: Value) -> None:
        """tokens: address of the first token tile. Leaves the sums of (band w, token tile t) in `sums` at w * 2 + t."""
        e = self.e
        for w in range(2):
            for t in range(n_tokens):
                tile(e, "tilezero", 2 * w + t)
        with e.loop(0, 16) as row:
            self._expand(band, e.constant(I64, 0), row, e.constant(I64, 0))
        rows_per_tile = 16 // self.tiles_per_block
        with e.loop(0, self.n_blocks) as i, e.loop(0, self.tiles_per_block) as j:
            self._multiply(n_tokens, e.at(self.buffer, (i & 1) * (2 * self.half_bytes) + j * TILE), e.at(tokens, i * self.half_bytes + j * TILE))
            for r in range(rows_per_tile):
                self._expand(band, e.minimum(i + 1, self.n_blocks - 1), j * rows_per_tile + r, i + 1)
        for w in range(2):
            for t in range(n_tokens):
                tile(e, "tilestored64", 2 * w + t, e.at(self.sums, (2 * w + t) * TILE), self.line)

    def _expand(self, band: Value, block: Value, row: Value, parity: Value) -> None:
        """One row of both bands into the buffer of that parity."""
        target = self.e.at(self.buffer, (parity & 1) * (2 * self.half_bytes))
        for w in range(2):
            codes = self.e.at(self.e.pointer("codes"), ((band + w) * self.n_blocks + block) * self.layout.block_bytes)
            self.expander.row(codes, band + w, block * self.layout.columns, row, self.e.at(target, w * self.half_bytes))

    def _multiply(self, n_tokens: int, weights: Value, tokens: Value) -> None:
        e = self.e
        tile(e, "tileloadd64", 4, weights, self.line)
        tile(e, "tileloadd64", 6, tokens, self.line)
        tile(e, "tdpbf16ps", 0, 4, 6)
        tile(e, "tileloadd64", 5, e.at(weights, self.half_bytes), self.line)
        tile(e, "tdpbf16ps", 2, 5, 6)
        if n_tokens == 2:
            tile(e, "tileloadd64", 7, e.at(tokens, self.n_blocks * self.half_bytes), self.line)
            tile(e, "tdpbf16ps", 1, 4, 7)
            tile(e, "tdpbf16ps", 3, 5, 7)


def gemm_kernel(bits: int, group: int, asymmetric: bool, offset: int) -> str:
    """bfloat16 `out [m, n]` from packed codes and the tiles of `pack_kernel`. group: 32, 64, or 128 for all multiples of 128, whose size is an argument."""
    e = Emitter(GEMM_ARGUMENTS)
    n_bands, per_item, n_blocks = e.argument("n_bands"), e.argument("bands_per_item"), e.argument("n_blocks")
    token_tiles = (e.argument("m") + 15) // 16
    product = Product(e, bits, Expander(e, bits, group, asymmetric, offset))
    write = Writer(e, product.sums, row_scaled=bits == 8)
    configure(e)
    with e.share((n_bands + per_item - 1) // per_item) as item, e.loop(0, token_tiles, 2) as first, e.loop(item * per_item, e.minimum(item * per_item + per_item, n_bands), 2) as band:
        tokens = e.at(e.pointer("tiles"), first * n_blocks * product.half_bytes)
        is_pair = (first + 1).less(token_tiles)
        for n_tokens, condition in ((2, is_pair), (1, e.negate(is_pair))):
            with e.when(condition):
                product(n_tokens, band, tokens)
                with e.loop(0, 2) as w, e.loop(0, n_tokens) as t:
                    write(band + w, first + t, w * 2 + t)
    tile(e, "tilerelease")
    return e.finish()


class Writer:
    """16 rows x 16 tokens of sums to the output, where they are transposed and rounded. 8-bit rows are scaled here."""

    def __init__(self, e: Emitter, sums: Value, row_scaled: bool) -> None:
        self.e, self.sums, self.row_scaled, self.rounded = e, sums, row_scaled, e.buffer(16 * 32)

    def __call__(self, band: Value, tokens: Value, place: Value) -> None:
        e, floats = self.e, vector(F32, 16)
        out, n, m = e.pointer("out"), e.argument("n"), e.argument("m")
        by_token = transpose(e, [e.load(floats, self.sums, place * TILE + 64 * row, align=64) for row in range(16)])
        for token, values in enumerate(by_token):
            scaled = values * e.load(floats, e.pointer("scale"), band * 64) if self.row_scaled else values
            e.store(scaled.to("fptrunc", vector(BF16, 16)), self.rounded, 32 * token, align=32)
        n_lanes, first = e.minimum(n - band * 16, e.constant(I64, 16)), tokens * 16
        with e.loop(0, e.minimum(m - first, e.constant(I64, 16))) as i:
            target = ((first + i) * n + band * 16) * 2
            with e.when(n_lanes.less(16)), e.loop(0, n_lanes) as lane:
                e.store(e.load(I16, self.rounded, i * 32 + lane * 2), out, target + lane * 2)
            with e.when(e.constant(I64, 15).less(n_lanes)):
                e.store(e.load(vector(I16, 16), self.rounded, i * 32, align=32), out, target)
