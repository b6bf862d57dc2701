"""Packed weights times INT8 activations: u8 x s8 products summed in int32, for weights of 8, 4, 3
and 2 bits.

Codes stay unsigned, which is what the instructions want of one side, and the zero point is one
correction per group: `sum_k s (q_k - z) x_k = s (sum_k q_k x_k) - s z (sum_k x_k)`. Within a group
all is exact in integers; groups meet in float32. Activations have a scale per token and group of
32, 64 or 128 columns, or per token; llama.cpp uses blocks of 32.

One text of the kernel, three forms of its inner step (`integer_dot`). Groups of 32 use 32-byte
vectors everywhere.

For one token the kernel is made to keep up with memory: 16 rows at a time, so that a vector of
activations is loaded once for all of them, and two floating-point instructions per row and group.
For more tokens unpacked codes are kept for 4 of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llmq_kernels.compiled.bfloat16 import rounded
from llmq_kernels.compiled.emit import F32, I8, I16, I32, I64, Emitter, Value, Variable, vector
from llmq_kernels.compiled.integer_dot import AHEAD, Dot, Rows
from llmq_kernels.compiled.layout import CHUNK, Layout

GEMM_ARGUMENTS = (
    "codes",
    "scale",
    "shift",
    "x",
    "x_scale",
    "x_sum",
    "out",
    "n",
    "m",
    "n_bands",
    "bands_per_item",
    "n_blocks",
    "n_groups",
    "columns_per_group",
)
# Rows x tokens in registers, for one token and for more.
BLOCKING = {
    "avx512vnni": ((16, 1), (4, 4)),
    "avxvnni": ((4, 1), (4, 2)),
    "avx2": ((4, 1), (4, 2)),
}


class Kind(NamedTuple):
    """What a kernel is written for. form: of its instructions. bits: of a code. group: columns that
    share scales on both sides; 0 for all of K. asymmetric: zero points are stored, else the code's
    offset is. to_bf16: results are bfloat16, not float32."""

    form: str
    bits: int
    group: int
    asymmetric: bool
    offset: int
    to_bf16: bool


class Place(NamedTuple):
    """Where a block of sums begins: the band, the row in it, the token."""

    band: Value
    row: Value
    token: Value


class Block:
    """The sums of `n_rows` rows and `n_tokens` tokens over all of K, in registers."""

    def __init__(self, e: Emitter, kind: Kind, n_rows: int, n_tokens: int) -> None:
        self.e, self.kind, self.n_rows, self.n_tokens = e, kind, n_rows, n_tokens
        self.layout = Layout(kind.bits, 1, 1)
        # Columns that are multiplied in one go.
        self.span = min(kind.group or CHUNK * 2, self.layout.columns)
        self.width = 64 if kind.form == "avx512vnni" and self.span >= 64 else 32
        self.lanes = vector(F32, self.width // 4)
        self.dot = Dot(e, kind.form, kind.bits, self.width)
        self.rows = Rows(e, kind.bits, self.width)
        self.factors = e.buffer(64 * n_tokens)
        self.n_blocks, self.n_groups = e.argument("n_blocks"), e.argument("n_groups")
        per_block = self.layout.columns // self.span
        self.x_groups = self.n_blocks * per_block if kind.group else e.constant(I64, 1)

    def __call__(self, place: Place) -> None:
        e = self.e
        sums = self._variables(e.constant(self.lanes, 0.0))
        corrections = self._corrections()
        with e.loop(0, self.n_blocks) as i:
            for start in range(0, self.layout.columns, self.span):
                column = i * self.layout.columns + start
                x_group = i * (self.layout.columns // self.span) + start // self.span
                self._factors(place, column, x_group, corrections)
                for r, t, products in self._products(place, i, start):
                    whole = self.dot(products).to("sitofp", self.lanes)
                    sums[r][t].set(e.fma(whole, self._factor(r, t), sums[r][t].get()))
        self._write(place, [self._reduced(row) for row in sums], corrections)

    def _reduced(self, sums: list[Variable]) -> list[Value]:
        """The sums of their lanes, float32."""
        return [self.e.reduce_add(lanes.get()) for lanes in sums]

    def _variables(self, first: Value) -> list[list[Variable]]:
        """One for each row and token."""
        return [self._row_of(first) for _ in range(self.n_rows)]

    def _row_of(self, first: Value) -> list[Variable]:
        return [self.e.variable(first) for _ in range(self.n_tokens)]

    def _corrections(self) -> list[Variable]:
        """What zero points contribute, for each token."""
        return self._row_of(self.e.constant(vector(F32, self.n_rows), 0.0))

    def _factors(
        self, place: Place, column: Value, x_group: Value, corrections: list[Variable]
    ) -> None:
        """Scale of the weight times scale of the activations, and the share of the zero points."""
        e, per_row = self.e, vector(F32, self.n_rows)
        group = place.band * self.n_groups + column // e.argument("columns_per_group")
        at = (group * 16 + place.row) * 4
        scale = e.load(per_row, e.pointer("scale"), at)
        for t in range(self.n_tokens):
            x_at = ((place.token + t) * self.x_groups + x_group) * 4
            x_scale = e.load(F32, e.pointer("x_scale"), x_at)
            x_sum = e.load(F32, e.pointer("x_sum"), x_at)
            e.store(scale * e.splat(x_scale, self.n_rows), self.factors, 64 * t)
            if self.kind.asymmetric:
                share, weight = e.load(per_row, e.pointer("shift"), at), x_sum * x_scale
            else:
                share, weight = scale, x_sum * x_scale * float(-self.kind.offset)
            corrections[t].set(e.fma(share, e.splat(weight, self.n_rows), corrections[t].get()))

    def _factor(self, row: int, token: int) -> Value:
        return self.e.splat(self._number(row, token), self.width // 4)

    def _number(self, row: int, token: int) -> Value:
        return self.e.load(F32, self.factors, 64 * token + 4 * row, align=4)

    def _products(
        self, place: Place, i: Value, start: int
    ) -> Iterator[tuple[int, int, list[tuple[Value, Value]]]]:
        """For each row and token its number and the pairs of vectors to multiply, of the columns of
        a block from `start` on."""
        e, columns = self.e, range(start, start + self.span)
        block = e.at(e.pointer("codes"), (place.band * self.n_blocks + i) * self.layout.block_bytes)
        x = [self._activations(place.token + t, i, columns) for t in range(self.n_tokens)]
        for r in range(self.n_rows):
            if start == 0:
                self._prefetch(block, place.row, i, r)
            codes = self.rows.codes(block, place.row + r, columns)
            for t in range(self.n_tokens):
                yield r, t, list(zip(codes, x[t], strict=True))

    def _activations(self, token: Value, i: Value, columns: range) -> list[Value]:
        """The vectors of a token that meet those columns of block i."""
        e, type_ = self.e, vector(I8, self.width)
        at = token * (self.n_blocks * self.layout.columns) + i * self.layout.columns
        steps = range(columns.start, columns.stop, self.width)
        return [e.load(type_, e.pointer("x"), at + column) for column in steps]

    def _prefetch(self, block: Value, first_row: Value, i: Value, row: int) -> None:
        """Where a pass takes all rows of a band, what it reads soon; else its share of the next
        band, in order, since memory is slow at giving every fourth quarter of a kilobyte."""
        if self.n_rows == 16:
            self.e.prefetch(block, (first_row + row) * 64 + AHEAD)
        else:
            band_bytes = self.n_blocks * self.layout.block_bytes
            start_of_band = self.e.at(block, self.e.constant(I64, 0) - i * self.layout.block_bytes)
            share = (first_row * self.n_blocks + i * self.n_rows + row) * 64
            self.e.prefetch(start_of_band, band_bytes + share, level=2)

    def _write(self, place: Place, totals: list[list[Value]], corrections: list[Variable]) -> None:
        e, n = self.e, self.e.argument("n")
        for t in range(self.n_tokens):
            e.store(corrections[t].get(), self.factors, 64 * t)
            for r in range(self.n_rows):
                row = place.band * 16 + place.row + r
                total = totals[r][t] + self._number(r, t)
                at = (place.token + t) * n + row
                with e.when(row.less(n)):
                    if self.kind.to_bf16:
                        half = (rounded(total) >> 16).to("trunc", I16)
                        e.store(half, e.pointer("out"), at * 2)
                    else:
                        e.store(total, e.pointer("out"), at * 4)


class WholeBlock(Block):
    """With one scale per row and one per token, sums stay integers over all of K."""

    def __call__(self, place: Place) -> None:
        e, none = self.e, self.e.constant(I64, 0)
        sums = self._variables(e.constant(self.dot.sums, 0))
        with e.loop(0, self.n_blocks) as i:
            for start in range(0, self.layout.columns, self.span):
                for r, t, products in self._products(place, i, start):
                    sums[r][t].set(self.dot(products, sums[r][t].get()))
        corrections = self._corrections()
        self._factors(place, none, none, corrections)
        whole = [self._reduced(row) for row in sums]
        totals = [self._scaled(r, row) for r, row in enumerate(whole)]
        self._write(place, totals, corrections)

    def _reduced(self, sums: list[Variable]) -> list[Value]:
        name = f"llvm.vector.reduce.add.v{self.width // 4}i32"
        return [self.e.call(name, I32, lanes.get()).to("sitofp", F32) for lanes in sums]

    def _scaled(self, row: int, sums: list[Value]) -> list[Value]:
        return [value * self._number(row, t) for t, value in enumerate(sums)]


def gemm_kernel(
    form: str, bits: int, group: int, asymmetric: bool, offset: int, to_bf16: bool
) -> str:
    """float32 or bfloat16 `out [m, n]` from packed codes and what `quantize_kernel` made, see
    `Kind`. group: 32, 64 or 128, the group of the activations, or 0 for all of K on both sides,
    with one x_scale and x_sum per token; `columns_per_group`, a multiple of it, is that of the
    weight."""
    e = Emitter(GEMM_ARGUMENTS)
    kind = Kind(form, bits, group, asymmetric, offset, to_bf16)
    m, block = e.argument("m"), Block if group else WholeBlock
    one, many = (block(e, kind, rows, tokens) for rows, tokens in BLOCKING[form])
    whole = m // many.n_tokens * many.n_tokens
    with e.share_bands() as band:
        with e.loop(0, whole, many.n_tokens) as token, e.loop(0, 16, many.n_rows) as row:
            many(Place(band, row, token))
        with e.loop(whole, m) as token, e.loop(0, 16, one.n_rows) as row:
            one(Place(band, row, token))
    return e.finish()
