"""Packed weights times INT8 activations with AVX512-VNNI, for more tokens than the kernels of
`vnni` are good at: what `amx_int8` does, without a tile unit.

Lanes are 16 tokens, transposed beforehand; four bytes of weights are broadcast and `vpdpbusd` adds
their products with each token's four bytes. A block of a band is spread to bytes once for 64
tokens; codes of 8 bits are multiplied from where they are. The 16 x 16 sums of a group are in
registers and meet the float32 sums, in the first-level cache, where the group ends: three
instructions for 32 products at groups of 128. With one scale per row and one per token all of K is
one group."""

from __future__ import annotations

from llmq_kernels.compiled.emit import F32, I32, I64, Emitter, Value, vector
from llmq_kernels.compiled.integer_dot import AHEAD, Rows
from llmq_kernels.compiled.layout import Layout
from llmq_kernels.compiled.token_tiles import FLOATS, TILE, write_floats

GEMM_ARGUMENTS = (
    "codes", "scale", "shift", "tiles", "x_scale", "x_start", "x_total", "out",
    "n", "m", "n_bands", "bands_per_item", "n_blocks", "n_groups", "columns_per_group",
)  # fmt: skip
TOKEN_TILES = 4  # that a spread block is used for
INTS = vector(I32, 16)


class Product:
    """A band of 16 rows times up to `TOKEN_TILES` token tiles. group: columns between two readings
    of the integer sums, or 0 for all of K."""

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
        self.n_blocks, self.none = e.argument("n_blocks"), e.constant(I64, 0)
        self.x_groups = (
            self.n_blocks * (self.layout.columns // group) if group else e.constant(I64, 1)
        )
        self.spread, self.sums, self.whole = (
            e.buffer(self.chunks * TILE),
            e.buffer(TOKEN_TILES * TILE),
            e.buffer(TOKEN_TILES * TILE),
        )
        self.registers = [e.variable(e.constant(INTS, 0)) for _ in range(16)]

    def __call__(self, band: Value, first: Value, n_tiles: Value) -> None:
        """first: number of the first token tile. Leaves float32 sums of token tile t in `sums` at
        t."""
        e = self.e
        with e.loop(0, n_tiles) as t:
            with e.loop(0, TILE, 64) as line:
                e.store(e.constant(FLOATS, 0.0), self.sums, t * TILE + line, align=64)
            if not self.group:
                self._start(first + t, self.none)
                self._keep(t)
        with e.loop(0, self.n_blocks) as i:
            weights = self._spread(band, i)
            with e.loop(0, n_tiles) as t:
                for chunk in range(self.chunks):
                    self._chunk(weights, band, first + t, t, i, chunk)
        if not self.group:
            with e.loop(0, n_tiles) as t:
                self._resume(t)
                self._read(band, first + t, t, self.none, self.none)

    def _spread(self, band: Value, block: Value) -> Value:
        """The address of a block's codes as tiles of 16 rows x 64 bytes."""
        e = self.e
        codes = e.at(e.pointer("codes"), (band * self.n_blocks + block) * self.layout.block_bytes)
        with e.loop(0, 16) as row:
            e.prefetch(codes, row * 64 + AHEAD)
            if self.bits != 8:
                for chunk, values in enumerate(
                    self.rows.codes(codes, row, range(self.layout.columns))
                ):
                    e.store(values, self.spread, row * 64 + chunk * TILE, align=64)
        return codes if self.bits == 8 else self.spread

    def _chunk(
        self, weights: Value, band: Value, tokens: Value, t: Value, i: Value, chunk: int
    ) -> None:
        """64 columns: begins a group, multiplies, ends a group."""
        group = (
            i * (self.layout.columns // self.group) + chunk * 64 // self.group
            if self.group
            else self.none
        )
        if not self.group and chunk == 0:
            self._resume(t)
        if self.group and chunk * 64 % self.group == 0:
            self._start(tokens, group)
        self._multiply(
            self.e.at(weights, chunk * TILE),
            self.e.at(
                self.e.pointer("tiles"), ((tokens * self.n_blocks + i) * self.chunks + chunk) * TILE
            ),
        )
        if self.group and (chunk + 1) * 64 % self.group == 0:
            self._read(band, tokens, t, group, i * self.layout.columns + chunk * 64)
        if not self.group and chunk == self.chunks - 1:
            self._keep(t)

    def _start(self, tokens: Value, group: Value) -> None:
        """Where all rows have the same zero point, sums start at `-zero * sum(x)`."""
        start = (
            self.e.constant(INTS, 0)
            if self.asymmetric
            else self.e.load(INTS, self.e.pointer("x_start"), (tokens * self.x_groups + group) * 64)
        )
        for register in self.registers:
            register.set(start)

    def _resume(self, t: Value) -> None:
        for row, register in enumerate(self.registers):
            register.set(self.e.load(INTS, self.whole, t * TILE + 64 * row, align=64))

    def _keep(self, t: Value) -> None:
        for row, register in enumerate(self.registers):
            self.e.store(register.get(), self.whole, t * TILE + 64 * row, align=64)

    def _multiply(self, weights: Value, tokens: Value) -> None:
        e = self.e
        with e.loop(
            0, 16
        ) as word:  # unrolled, LLVM would load everything first and run out of registers
            x = e.load(INTS, tokens, word * 64, align=64)
            for row, register in enumerate(self.registers):
                codes = e.splat(e.load(I32, weights, word * 4 + 64 * row, align=4), 16)
                register.set(e.call("llvm.x86.avx512.vpdpbusd.512", INTS, register.get(), codes, x))

    def _read(self, band: Value, tokens: Value, t: Value, group: Value, column: Value) -> None:
        """Scale the integer sums of a group and add them to the float32 ones."""
        e = self.e
        place = (band * e.argument("n_groups") + column // e.argument("columns_per_group")) * 64
        x_place = (tokens * self.x_groups + group) * 64
        x_scale = e.load(FLOATS, e.pointer("x_scale"), x_place)
        x_total = e.load(FLOATS, e.pointer("x_total"), x_place) if self.asymmetric else x_scale
        for row, register in enumerate(self.registers):
            target = t * TILE + 64 * row
            values = register.get().to("sitofp", FLOATS) * x_scale
            total = e.fma(
                values,
                e.splat(e.load(F32, e.pointer("scale"), place + 4 * row, align=4), 16),
                e.load(FLOATS, self.sums, target, align=64),
            )
            if self.asymmetric:
                total = e.fma(
                    x_total,
                    e.splat(e.load(F32, e.pointer("shift"), place + 4 * row, align=4), 16),
                    total,
                )
            e.store(total, self.sums, target, align=64)


def gemm_kernel(bits: int, group: int, asymmetric: bool) -> str:
    """float32 `out [m, n]`. x_scale, x_start, x_total: per token tile and group 16 values: scales,
    the int32 sums to start from, and without a common zero point scale times sum of codes."""
    e = Emitter(GEMM_ARGUMENTS)
    n_bands, per_item = e.argument("n_bands"), e.argument("bands_per_item")
    token_tiles = (e.argument("m") + 15) // 16
    product, lines = Product(e, bits, group, asymmetric), e.buffer(TILE)
    items = e.share((n_bands + per_item - 1) // per_item)
    with (
        items as item,
        e.loop(0, token_tiles, TOKEN_TILES) as first,
        e.loop(item * per_item, e.minimum(item * per_item + per_item, n_bands)) as band,
    ):
        n_tiles = e.minimum(token_tiles - first, e.constant(I64, TOKEN_TILES))
        product(band, first, n_tiles)
        with e.loop(0, n_tiles) as t:
            write_floats(e, product.sums, lines, band, first + t, t * TILE)
    return e.finish()
