"""Packed weights times INT8 activations on the tile unit, for more tokens than the vector kernels
are good at.

`Y^T = W X^T` with tiles of 16 rows of W by 64 columns, as unsigned bytes, and 64 columns by 16
tokens, signed. Codes of 8 bits are multiplied straight from their place; narrower ones are spread
to bytes while the unit multiplies with the block before. Sums start at `-zero * sum(x)` instead of
0 where all rows have the same zero point: a tile that is loaded with a stride of 0 has 16 equal
rows.

Where a group ends, its 16 x 16 sums are scaled and added up in float32, which takes the vector unit
about as long as the tile unit takes for the group. With one scale per row and one per token there
is one group: all of K. Groups of 32 are not worth a tile; `vnni` does them."""

from __future__ import annotations

from llmq_kernels.compiled.amx import configure, tile
from llmq_kernels.compiled.emit import F32, I32, I64, Emitter, Value, vector
from llmq_kernels.compiled.integer_dot import Rows
from llmq_kernels.compiled.layout import Layout
from llmq_kernels.compiled.token_tiles import FLOATS, TILE, write_floats

GEMM_ARGUMENTS = (
    "codes", "scale", "shift", "tiles", "x_scale", "x_start", "x_total", "out",
    "n", "m", "n_bands", "bands_per_item", "n_blocks", "n_groups", "columns_per_group",
)  # fmt: skip


class Product:
    """32 rows of W times 16 or 32 tokens. group: columns between two readings of the tiles, or 0
    for all of K."""

    def __init__(self, e: Emitter, bits: int, group: int, asymmetric: bool) -> None:
        self.e, self.bits, self.group, self.asymmetric, self.layout, self.rows = (
            e,
            bits,
            group,
            asymmetric,
            Layout(bits, 1, 1),
            Rows(e, bits, 64),
        )
        self.chunks = self.layout.fields  # of 64 columns in a block
        self.buffer, self.raw, self.sums = (
            e.buffer(4 * self.chunks * TILE),
            e.buffer(TILE),
            e.buffer(4 * TILE),
        )
        self.n_blocks, self.line, self.none = (
            e.argument("n_blocks"),
            e.constant(I64, 64),
            e.constant(I64, 0),
        )
        self.x_groups = (
            self.n_blocks * (self.layout.columns // group) if group else e.constant(I64, 1)
        )

    def __call__(self, n_tokens: int, band: Value, first: Value) -> None:
        """first: number of the first token tile. Leaves the sums of (band w, token tile t) in
        `sums` at 2 * w + t."""
        e, zero = self.e, self.e.constant(FLOATS, 0.0)
        with e.loop(0, 4 * TILE, 64) as i:
            e.store(zero, self.sums, i, align=64)
        if self.bits != 8:
            with e.loop(0, 16) as row:
                self._spread(band, self.none, row, self.none)
        if not self.group:
            self._start(n_tokens, first, self.none)
        with e.loop(0, self.n_blocks) as i:
            for chunk in range(self.chunks):
                if self.group and chunk * 64 % self.group == 0:
                    self._start(n_tokens, first, self._group(i, chunk))
                self._multiply(n_tokens, band, first, i, chunk)
                if self.group and (chunk + 1) * 64 % self.group == 0:
                    self._read(
                        n_tokens,
                        band,
                        first,
                        self._group(i, chunk),
                        i * self.layout.columns + chunk * 64,
                    )
                self._spread_share(band, i, chunk)
        if not self.group:
            self._read(n_tokens, band, first, self.none, self.none)

    def _group(self, i: Value, chunk: int) -> Value:
        return i * (self.layout.columns // self.group) + chunk * 64 // self.group

    def _codes(self, band: Value, block: Value) -> Value:
        return self.e.at(
            self.e.pointer("codes"), (band * self.n_blocks + block) * self.layout.block_bytes
        )

    def _spread_share(self, band: Value, i: Value, chunk: int) -> None:
        """This chunk's share of the rows of the next block."""
        if self.bits == 8:
            return
        rows = 16 // self.chunks
        with self.e.loop(chunk * rows, (chunk + 1) * rows) as row:
            self._spread(band, self.e.minimum(i + 1, self.n_blocks - 1), row, i + 1)

    def _spread(self, band: Value, block: Value, row: Value, parity: Value) -> None:
        """One row of both bands as bytes into the buffer of that parity: [band, chunk, 16 rows,
        64]."""
        e = self.e
        for w in range(2):
            codes = self._codes(band + w, block)
            e.prefetch(codes, row * 64 + 4096)
            for chunk, values in enumerate(self.rows.codes(codes, row, range(self.layout.columns))):
                e.store(
                    values,
                    self.buffer,
                    (parity & 1) * (2 * self.chunks * TILE)
                    + (row * 64 + (w * self.chunks + chunk) * TILE),
                    align=64,
                )

    def _start(self, n_tokens: int, first: Value, group: Value) -> None:
        e = self.e
        for w in range(2):
            for t in range(n_tokens):
                if self.asymmetric:
                    tile(e, "tilezero", 2 * w + t)
                else:
                    tile(
                        e,
                        "tileloadd64",
                        2 * w + t,
                        e.at(e.pointer("x_start"), ((first + t) * self.x_groups + group) * 64),
                        self.none,
                    )

    def _multiply(self, n_tokens: int, band: Value, first: Value, i: Value, chunk: int) -> None:
        e = self.e
        for w in range(2):
            spread = e.at(
                self.buffer, (i & 1) * (2 * self.chunks * TILE) + (w * self.chunks + chunk) * TILE
            )
            weights = self._codes(band + w, i) if self.bits == 8 else spread
            if self.bits == 8:
                with e.loop(0, TILE, 64) as line:
                    e.prefetch(weights, line + 4096)
            tile(e, "tileloadd64", 4 + w, weights, self.line)
        for t in range(n_tokens):
            place = ((first + t) * (self.n_blocks * self.chunks) + i * self.chunks + chunk) * TILE
            tile(e, "tileloadd64", 6 + t, e.at(e.pointer("tiles"), place), self.line)
            for w in range(2):
                tile(e, "tdpbusd", 2 * w + t, 4 + w, 6 + t)

    def _read(self, n_tokens: int, band: Value, first: Value, group: Value, column: Value) -> None:
        """Scale the integer sums of a group and add them to the float32 ones."""
        e = self.e
        for w in range(2):
            place = (
                (band + w) * e.argument("n_groups") + column // e.argument("columns_per_group")
            ) * 64
            for t in range(n_tokens):
                tile(e, "tilestored64", 2 * w + t, self.raw, self.line)
                x_place = ((first + t) * self.x_groups + group) * 64
                x_scale = e.load(FLOATS, e.pointer("x_scale"), x_place)
                for row in range(16):
                    target = (2 * w + t) * TILE + row * 64
                    values = (
                        e.load(vector(I32, 16), self.raw, row * 64, align=64).to("sitofp", FLOATS)
                        * x_scale
                    )
                    total = e.fma(
                        values,
                        e.splat(e.load(F32, e.pointer("scale"), place + 4 * row, align=4), 16),
                        e.load(FLOATS, self.sums, target, align=64),
                    )
                    if self.asymmetric:
                        shift = e.splat(
                            e.load(F32, e.pointer("shift"), place + 4 * row, align=4), 16
                        )
                        total = e.fma(e.load(FLOATS, e.pointer("x_total"), x_place), shift, total)
                    e.store(total, self.sums, target, align=64)


def gemm_kernel(bits: int, group: int, asymmetric: bool) -> str:
    """float32 `out [m, n]`. x_scale, x_start, x_total: per token tile and group 16 values: scales,
    the int32 sums to start from, and without a common zero point scale times sum of codes."""
    e = Emitter(GEMM_ARGUMENTS)
    n_bands, per_item = e.argument("n_bands"), e.argument("bands_per_item")
    token_tiles = (e.argument("m") + 15) // 16
    product = Product(e, bits, group, asymmetric)
    lines = e.buffer(TILE)
    configure(e)
    with (
        e.share((n_bands + per_item - 1) // per_item) as item,
        e.loop(0, token_tiles, 2) as first,
        e.loop(item * per_item, e.minimum(item * per_item + per_item, n_bands), 2) as band,
    ):
        is_pair = (first + 1).less(token_tiles)
        for n_tokens, condition in ((2, is_pair), (1, e.negate(is_pair))):
            with e.when(condition):
                product(n_tokens, band, first)
                with e.loop(0, 2) as w, e.loop(0, n_tokens) as t:
                    write_floats(e, product.sums, lines, band + w, first + t, (w * 2 + t) * TILE)
    tile(e, "tilerelease")
    return e.finish()
