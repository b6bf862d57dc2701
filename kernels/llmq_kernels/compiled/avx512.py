"""Packed weights times bfloat16 activations on CPUs with AVX512 and `vdpbf16ps` (AMD since Zen 4,
Intel's Cooper Lake), without a tile unit.

`vdpbf16ps` multiplies 32 pairs of bfloat16 and adds neighbours into 16 float32 lanes, as fast as a
plain fused multiply-add does half the work, so nothing but this instruction should be in the way.

Few tokens (`few_kernel`): a row is expanded in registers (`expand`) and meets each token's
activations as they lie in memory; lanes are columns and are summed once, at the end of K. Up to
four tokens cost hardly more than one, since expanding 32 columns takes longer than multiplying
them. 16 sums of rows x tokens stay in registers.

Many tokens (`gemm_kernel`): lanes are 16 tokens, transposed beforehand, so that a pair of weights
is broadcast from memory by the multiplication itself and nothing is summed across lanes. A block of
a band, 16 rows x 128 columns at 4 bits, is expanded into 4 KB and used for up to 64 tokens; the 16
x 16 sums that are being added to are in registers, the others in the first-level cache."""

from __future__ import annotations

from llmq_kernels.compiled.emit import BF16, I16, I32, I64, Emitter, Value, vector
from llmq_kernels.compiled.expand import Expander
from llmq_kernels.compiled.layout import Layout
from llmq_kernels.compiled.token_tiles import FLOATS, TILE, BF16Writer, store_line

ORDER_ARGUMENTS = ("x", "ordered", "m", "n_chunks")
FEW_ARGUMENTS = (
    "codes",
    "scale",
    "shift",
    "x",
    "out",
    "n",
    "m",
    "n_bands",
    "bands_per_item",
    "n_blocks",
    "n_groups",
    "columns_per_group",
)
GEMM_ARGUMENTS = (
    "codes",
    "scale",
    "shift",
    "tiles",
    "out",
    "n",
    "m",
    "n_bands",
    "bands_per_item",
    "n_blocks",
    "n_groups",
    "columns_per_group",
)
FEW = 8  # tokens that `few_kernel` takes
# that an expanded block is used for: 512 KB of activations at K = 4096, half of a second-level
# cache
TOKEN_TILES = 4
PAIRS = vector(BF16, 32)


def dot(e: Emitter, total: Value, a: Value, b: Value) -> Value:
    """total float32 x 16, plus the sums of neighbours of the products of 32 bfloat16."""
    return e.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, a.cast(PAIRS), b.cast(PAIRS))


class SumTile:
    """Sums of 16 rows x 16 tokens in 16 registers; one is reused for all products of a kernel."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.rows = e, [e.variable(e.constant(FLOATS, 0.0)) for _ in range(16)]

    def load(self, sums: Value, place: Value) -> None:
        for r, row in enumerate(self.rows):
            row.set(self.e.load(FLOATS, sums, place + 64 * r, align=64))

    def store(self, sums: Value, place: Value) -> None:
        for r, row in enumerate(self.rows):
            self.e.store(row.get(), sums, place + 64 * r, align=64)

    def multiply(self, weights: Value, tokens: Value) -> None:
        """Add the product of a tile of weights, 16 rows x 32 columns, and a token tile."""
        e = self.e
        with e.loop(
            0, 16
        ) as pair:  # unrolled, LLVM would load everything first and run out of registers
            x = e.load(vector(I32, 16), tokens, pair * 64, align=64)
            for r, row in enumerate(self.rows):
                row.set(
                    dot(
                        e,
                        row.get(),
                        x,
                        e.splat(e.load(I32, weights, pair * 4 + 64 * r, align=4), 16),
                    )
                )


def gemm_kernel(bits: int, group: int, asymmetric: bool, offset: int) -> str:
    """bfloat16 `out [m, n]` from packed codes and the tiles of `token_tiles.bf16_pack_kernel`.
    group: 32, 64, or 128 for all multiples of 128, whose size is an argument."""
    e = Emitter(GEMM_ARGUMENTS)
    layout, expander = Layout(bits, 1, 1), Expander(e, bits, group, asymmetric, offset)
    tiles_per_block = layout.columns // 32
    n_bands, per_item, n_blocks = (
        e.argument("n_bands"),
        e.argument("bands_per_item"),
        e.argument("n_blocks"),
    )
    token_tiles = (e.argument("m") + 15) // 16
    weights, sums = e.buffer(tiles_per_block * TILE), e.buffer(TOKEN_TILES * TILE)
    write, tile = BF16Writer(e, sums, row_scaled=bits == 8), SumTile(e)
    bands = e.share((n_bands + per_item - 1) // per_item)
    with (
        bands as item,
        e.loop(0, token_tiles, TOKEN_TILES) as first,
        e.loop(item * per_item, e.minimum(item * per_item + per_item, n_bands)) as band,
    ):
        n_tiles = e.minimum(token_tiles - first, e.constant(I64, TOKEN_TILES))
        with e.loop(0, n_tiles * TILE, 64) as line:
            e.store(e.constant(FLOATS, 0.0), sums, line, align=64)
        with e.loop(0, n_blocks) as i:
            codes = e.at(e.pointer("codes"), (band * n_blocks + i) * layout.block_bytes)
            with e.loop(0, 16) as row:
                expander.store_row(codes, band, i * layout.columns, row, weights)
            with e.loop(0, n_tiles) as t:
                tile.load(sums, t * TILE)
                with e.loop(0, tiles_per_block) as j:
                    tile.multiply(
                        e.at(weights, j * TILE),
                        e.at(
                            e.pointer("tiles"),
                            (((first + t) * n_blocks + i) * tiles_per_block + j) * TILE,
                        ),
                    )
                tile.store(sums, t * TILE)
        with e.loop(0, n_tiles) as t:
            write(band, first + t, t)
    return e.finish()


# --- few tokens -----------------------------------------------------------------------------------


def order_kernel() -> str:
    """Activations bfloat16 `[m, k]` with columns in the order in which weights are expanded: of
    each 64 first the even ones."""
    e = Emitter(ORDER_ARGUMENTS)
    lanes, n_chunks = vector(I16, 32), e.argument("n_chunks")
    with e.share(e.argument("m")) as token, e.loop(0, n_chunks) as chunk:
        place = (token * n_chunks + chunk) * 128
        first, second = (
            e.load(lanes, e.pointer("x"), place),
            e.load(lanes, e.pointer("x"), place + 64),
        )
        for half in range(2):
            e.store(
                first.shuffle(list(range(half, 64, 2)), second),
                e.pointer("ordered"),
                place + 64 * half,
            )
    return e.finish()


class Few:
    """`n_tokens` tokens in 16 / n_tokens rows at a time."""

    def __init__(
        self, e: Emitter, expander: Expander, bits: int, n_tokens: int, lines: Value
    ) -> None:
        self.e, self.expander, self.layout, self.n_tokens, self.lines = (
            e,
            expander,
            Layout(bits, 1, 1),
            n_tokens,
            lines,
        )
        self.n_blocks, self.row_scaled = e.argument("n_blocks"), bits == 8

    def __call__(self, band: Value) -> None:
        e, n_rows = self.e, 16 // self.n_tokens
        with e.loop(0, 16, n_rows) as first:
            sums = [
                [e.variable(e.constant(FLOATS, 0.0)) for _ in range(self.n_tokens)]
                for _ in range(n_rows)
            ]
            with e.loop(0, self.n_blocks) as i:
                block = e.at(
                    e.pointer("codes"), (band * self.n_blocks + i) * self.layout.block_bytes
                )
                for r in range(n_rows):
                    for place, weights in enumerate(
                        self.expander.row(block, band, i * self.layout.columns, first + r)
                    ):
                        for t in range(self.n_tokens):
                            sums[r][t].set(
                                dot(
                                    e,
                                    sums[r][t].get(),
                                    weights,
                                    self._activations(t, i * self.layout.columns + 32 * place),
                                )
                            )
            for r in range(n_rows):
                for t in range(self.n_tokens):
                    e.store(
                        e.reduce_add(sums[r][t].get()),
                        self.lines,
                        (first + r) * 4 + 64 * t,
                        align=4,
                    )
        self._write(band)

    def _activations(self, token: int, column: Value) -> Value:
        """32 of them. Tokens that are not there repeat the last one; nobody reads their sums."""
        row = self.e.minimum(self.e.constant(I64, token), self.e.argument("m") - 1)
        return self.e.load(
            vector(I16, 32),
            self.e.pointer("x"),
            (row * (self.n_blocks * self.layout.columns) + column) * 2,
        )

    def _write(self, band: Value) -> None:
        e, n = self.e, self.e.argument("n")
        for t in range(self.n_tokens):
            values = e.load(FLOATS, self.lines, 64 * t, align=64)
            scaled = (
                values * e.load(FLOATS, e.pointer("scale"), band * 64)
                if self.row_scaled
                else values
            )
            e.store(scaled.to("fptrunc", vector(BF16, 16)), self.lines, 64 * t, align=64)
        with e.loop(0, e.argument("m")) as token:
            store_line(e, I16, self.lines, token * 2, token * n + band * 16, n - band * 16)


def few_kernel(bits: int, group: int, asymmetric: bool, offset: int) -> str:
    """bfloat16 `out [m, n]` from packed codes and at most `FEW` tokens of `order_kernel`."""
    e = Emitter(FEW_ARGUMENTS)
    m, lines, expander = (
        e.argument("m"),
        e.buffer(64 * FEW),
        Expander(e, bits, group, asymmetric, offset),
    )
    with e.share_bands() as band:
        for fewer, n_tokens in ((0, 1), (1, 2), (2, 4), (4, FEW)):
            with e.when(e.constant(I64, fewer).less(m)), e.when(m.less(n_tokens + 1)):
                Few(e, expander, bits, n_tokens, lines)(band)
    return e.finish()
