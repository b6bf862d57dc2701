"""Packed weights times bfloat16 activations on the tile unit (AMX) of recent Xeons.

`Y^T = W X^T`: a tile holds 16 rows of W by 32 columns, expanded from packed codes into a buffer in
the first-level cache, and meets a tile of X^T, 32 columns by 16 tokens, in 16 cycles. Expanding
those 512 weights takes about 24 (`expand`). So two tiles of tokens cost about as much as one,
from there on the tile unit is the limit, and no bfloat16 weight is ever read from memory, which is
what a bfloat16 GEMM spends its time with at few tokens.

Blocking: 32 rows x 512 columns of W are expanded at a time (32 KB) and used for all tokens of the
call; an item of work is some bands of rows, whose sums stay in the second-level cache between the
steps along K."""

from __future__ import annotations

from llmq_kernels.compiled.emit import I8, I64, VOID, Emitter, Value, vector
from llmq_kernels.compiled.expand import Expander
from llmq_kernels.compiled.layout import Layout
from llmq_kernels.compiled.token_tiles import TILE, BF16Writer

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


def tile(e: Emitter, name: str, *operands: int | Value) -> None:
    """A tile instruction; tile numbers are immediates."""
    e.call(
        f"llvm.x86.{name}",
        VOID,
        *(e.constant(I8, value) if isinstance(value, int) else value for value in operands),
    )


def configure(e: Emitter) -> None:
    """All eight tiles with 16 rows of 64 bytes."""
    config = e.buffer(64)
    e.store(
        e.constant(vector(I8, 64), [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8),
        config,
    )
    tile(e, "ldtilecfg", config)


class Product:
    """32 rows of W times 16 or 32 tokens: sums stay in tiles 0 to 3 along all of K, while the
    vector unit expands block i + 1 the tile unit multiplies with block i."""

    def __init__(self, e: Emitter, bits: int, expander: Expander) -> None:
        self.e, self.expander, self.layout = e, expander, Layout(bits, 1, 1)
        self.tiles_per_block = self.layout.columns // 32
        self.half_bytes = self.tiles_per_block * TILE  # of one band's block, expanded
        self.buffer, self.sums = e.buffer(4 * self.half_bytes), e.buffer(4 * TILE)
        self.n_blocks, self.line = e.argument("n_blocks"), e.constant(I64, 64)

    def __call__(self, n_tokens: int, band: Value, tokens: Value) -> None:
        """tokens: address of the first token tile. Leaves the sums of (band w, token tile t) in
        `sums` at w * 2 + t."""
        e = self.e
        for w in range(2):
            for t in range(n_tokens):
                tile(e, "tilezero", 2 * w + t)
        with e.loop(0, 16) as row:
            self._expand(band, e.constant(I64, 0), row, e.constant(I64, 0))
        rows_per_tile = 16 // self.tiles_per_block
        with e.loop(0, self.n_blocks) as i, e.loop(0, self.tiles_per_block) as j:
            self._multiply(
                n_tokens,
                e.at(self.buffer, (i & 1) * (2 * self.half_bytes) + j * TILE),
                e.at(tokens, i * self.half_bytes + j * TILE),
            )
            for r in range(rows_per_tile):
                self._expand(
                    band, e.minimum(i + 1, self.n_blocks - 1), j * rows_per_tile + r, i + 1
                )
        for w in range(2):
            for t in range(n_tokens):
                tile(e, "tilestored64", 2 * w + t, e.at(self.sums, (2 * w + t) * TILE), self.line)

    def _expand(self, band: Value, block: Value, row: Value, parity: Value) -> None:
        """One row of both bands into the buffer of that parity."""
        target = self.e.at(self.buffer, (parity & 1) * (2 * self.half_bytes))
        for w in range(2):
            codes = self.e.at(
                self.e.pointer("codes"),
                ((band + w) * self.n_blocks + block) * self.layout.block_bytes,
            )
            self.expander.store_row(
                codes,
                band + w,
                block * self.layout.columns,
                row,
                self.e.at(target, w * self.half_bytes),
            )

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
    """bfloat16 `out [m, n]` from packed codes and the tiles of `token_tiles.bf16_pack_kernel`.
    group: 32, 64, or 128 for all multiples of 128, whose size is an argument."""
    e = Emitter(GEMM_ARGUMENTS)
    n_bands, per_item, n_blocks = (
        e.argument("n_bands"),
        e.argument("bands_per_item"),
        e.argument("n_blocks"),
    )
    token_tiles = (e.argument("m") + 15) // 16
    product = Product(e, bits, Expander(e, bits, group, asymmetric, offset))
    write = BF16Writer(e, product.sums, row_scaled=bits == 8)
    configure(e)
    with (
        e.share((n_bands + per_item - 1) // per_item) as item,
        e.loop(0, token_tiles, 2) as first,
        e.loop(item * per_item, e.minimum(item * per_item + per_item, n_bands), 2) as band,
    ):
        tokens = e.at(e.pointer("tiles"), first * n_blocks * product.half_bytes)
        is_pair = (first + 1).less(token_tiles)
        for n_tokens, condition in ((2, is_pair), (1, e.negate(is_pair))):
            with e.when(condition):
                product(n_tokens, band, tokens)
                with e.loop(0, 2) as w, e.loop(0, n_tokens) as t:
                    write(band + w, first + t, w * 2 + t)
    tile(e, "tilerelease")
    return e.finish()
