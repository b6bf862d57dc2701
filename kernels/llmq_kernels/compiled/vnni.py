"""Packed weights times INT8 activations: u8 x s8 products summed in int32, for weights of 8, 4, 3
and 2 bits.

Codes stay unsigned, which is what the instructions want of one side, and the zero point is one
correction per group: `sum_k s (q_k - z) x_k = s (sum_k q_k x_k) - s z (sum_k x_k)`. Within a group
all is exact in integers; groups meet in float32. Activations have a scale per token and group of
32, 64 or 128 columns, or per token; llama.cpp uses blocks of 32.

One text of the kernel, three forms of its inner step, chosen by what the CPU has: `vpdpbusd` on 64
bytes (AVX512-VNNI), on 32 bytes (AVX-VNNI), and `vpmaddubsw` + `vpmaddwd` (AVX2). The last adds
pairs in int16, where four products of 4 bits stay below 2^15, and splits 8-bit codes into 7 + 1
bits. Groups of 32 use 32-byte vectors everywhere.

For one token the kernel is made to keep up with memory: 16 rows at a time, so that a vector of
activations is loaded once for all of them, and two floating-point instructions per row and group.
For more tokens unpacked codes are kept for 4 of them."""

from __future__ import annotations

from collections.abc import Iterator

from llmq_kernels.compiled.bfloat16 import load_bf16, rounded
from llmq_kernels.compiled.emit import F32, I1, I8, I16, I32, I64, Emitter, Value, Variable, vector
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
QUANTIZE_ARGUMENTS = ("x", "codes", "scale", "sum", "m", "k", "span", "group")
BLOCKING = {
    "avx512vnni": ((16, 1), (4, 4)),
    "avxvnni": ((4, 1), (4, 2)),
    "avx2": ((4, 1), (4, 2)),
}  # rows x tokens in registers, for one token and for more
AHEAD = 4096  # bytes of codes to fetch ahead of their use


def quantize_kernel(is_bf16: bool) -> str:
    """float32 or bfloat16 x `[m, k]` to int8 codes, and per group of `group` columns a float32
    scale and the sum of the codes. One scale serves `span` columns, a multiple of the group: the
    group itself, or all of k. `reference.quantize_groups` in machine code: absmax / 127, at least
    1e-8, a true division, ties to even."""
    e = Emitter(QUANTIZE_ARGUMENTS)
    floats, ints, sign = vector(F32, 16), vector(I32, 16), e.constant(vector(I32, 16), 0x7FFFFFFF)
    k, span, group = e.argument("k"), e.argument("span"), e.argument("group")

    def load(column: Value) -> Value:
        return (
            load_bf16(e, e.pointer("x"), column * 2)
            if is_bf16
            else e.load(floats, e.pointer("x"), column * 4)
        )

    with e.share(e.argument("m")) as token, e.loop(0, k // span) as s:
        first = token * k + s * span
        largest = e.variable(e.constant(floats, 0.0))
        with e.loop(0, span, 16) as i:
            magnitude = (load(first + i).cast(ints) & sign).cast(floats)
            largest.set(e.call("llvm.maxnum.v16f32", floats, largest.get(), magnitude))
        scale = e.call(
            "llvm.maxnum.f32",
            F32,
            e.call("llvm.vector.reduce.fmax.v16f32", F32, largest.get()) / 127.0,
            e.constant(F32, 1e-8),
        )
        with e.loop(0, span // group) as g:
            total, place = e.variable(e.constant(ints, 0)), (first // group + g) * 4
            with e.loop(0, group, 16) as offset:
                column = first + g * group + offset
                codes = e.call("llvm.rint.v16f32", floats, load(column) / e.splat(scale, 16)).to(
                    "fptosi", ints
                )
                e.store(codes.to("trunc", vector(I8, 16)), e.pointer("codes"), column)
                total.set(total.get() + codes)
            e.store(scale, e.pointer("scale"), place)
            e.store(
                e.call("llvm.vector.reduce.add.v16i32", I32, total.get()).to("sitofp", F32),
                e.pointer("sum"),
                place,
            )
    return e.finish()


class Dot:
    """The integer product of `width` bytes of codes with as many activations, added up in int32
    lanes of four columns each."""

    def __init__(self, e: Emitter, form: str, bits: int, width: int) -> None:
        self.e, self.form, self.bits = e, form, bits
        self.bytes, self.pairs, self.sums = (
            vector(I8, width),
            vector(I16, width // 2),
            vector(I32, width // 4),
        )
        self.width = width

    def __call__(self, products: list[tuple[Value, Value]], total: Value | None = None) -> Value:
        """The sum over (codes, activations), which lie in one group, added to a total."""
        if self.form != "avx2":
            total = self.e.constant(self.sums, 0) if total is None else total
            for codes, x in products:
                total = self.e.call(
                    f"llvm.x86.avx512.vpdpbusd.{8 * self.width}",
                    self.sums,
                    total,
                    *self._operands(codes, x),
                )
            return total
        start = [] if total is None else [total]
        if self.bits < 8:
            return _sum([*start, self._pairs([self._products(codes, x) for codes, x in products])])
        low = [self._pairs([self._products(codes & 127, x)]) for codes, x in products]
        high = [self._pairs([self._products((codes >> 7) & 1, x)]) << 7 for codes, x in products]
        return _sum(start + low + high)

    def _operands(self, codes: Value, x: Value) -> tuple[Value, Value]:
        """LLVM has declared them as vectors of int32, later of bytes."""
        return codes.cast(self.sums), x.cast(self.sums)

    def _products(self, codes: Value, x: Value) -> Value:
        return self.e.call("llvm.x86.avx2.pmadd.ub.sw", self.pairs, codes, x)

    def _pairs(self, pairs: list[Value]) -> Value:
        return self.e.call(
            "llvm.x86.avx2.pmadd.wd", self.sums, _sum(pairs), self.e.constant(self.pairs, 1)
        )


def _sum(values: list[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


class Rows:
    """Unpacks the codes of a row of a block."""

    def __init__(self, e: Emitter, bits: int, width: int) -> None:
        self.e, self.bits, self.width, self.layout = e, bits, width, Layout(bits, 1, 1)

    def codes(self, block: Value, row: Value, columns: range) -> list[Value]:
        """The vectors that hold those columns of the block; row: its number in the band."""
        return [
            self._vector(block, row, column // 64, column % 64)
            for column in range(columns.start, columns.stop, self.width)
        ]

    def _vector(self, block: Value, row: Value, chunk: int, offset: int) -> Value:
        e, bytes_ = self.e, vector(I8, self.width)
        low = e.load(bytes_, block, row * 64 + offset)
        if self.bits == 8:
            return low
        field = 2 if self.bits == 3 else self.bits
        # Shifts of 16-bit lanes, since x86 has none of bytes; the mask removes what came over from
        # the neighbour.
        codes = (low.cast(vector(I16, self.width // 2)) >> (field * chunk)).cast(bytes_) & (
            (1 << field) - 1
        )
        if self.bits != 3:
            return codes
        high = e.load(vector(I1, self.width), block, row * 32 + (1024 + 8 * chunk + offset // 8))
        return codes | e.select(high, e.constant(bytes_, 4), e.constant(bytes_, 0))


class Block:
    """The sums of `n_rows` rows and `n_tokens` tokens over all of K, in registers. group: columns
    that share scales on both sides."""

    def __init__(
        self,
        e: Emitter,
        form: str,
        bits: int,
        group: int,
        asymmetric: bool,
        offset: int,
        to_bf16: bool,
        n_rows: int,
        n_tokens: int,
    ) -> None:
        self.e, self.asymmetric, self.offset, self.to_bf16, self.n_rows, self.n_tokens = (
            e,
            asymmetric,
            offset,
            to_bf16,
            n_rows,
            n_tokens,
        )
        self.layout = Layout(bits, 1, 1)
        self.span = min(
            group or CHUNK * 2, self.layout.columns
        )  # columns that are multiplied in one go
        self.width = 64 if form == "avx512vnni" and self.span >= 64 else 32
        self.lanes = vector(F32, self.width // 4)
        self.dot, self.rows = Dot(e, form, bits, self.width), Rows(e, bits, self.width)
        self.factors = e.buffer(64 * n_tokens)
        self.n_blocks, self.n_groups = e.argument("n_blocks"), e.argument("n_groups")
        self.x_groups = (
            self.n_blocks * (self.layout.columns // self.span) if group else e.constant(I64, 1)
        )

    def __call__(self, band: Value, first_row: Value, first_token: Value) -> None:
        e = self.e
        sums = self._variables(e.constant(self.lanes, 0.0))
        corrections = self._corrections()
        with e.loop(0, self.n_blocks) as i:
            for start in range(0, self.layout.columns, self.span):
                column = i * self.layout.columns + start
                self._factors(
                    band,
                    first_row,
                    first_token,
                    column,
                    i * (self.layout.columns // self.span) + start // self.span,
                    corrections,
                )
                for r, t, products in self._products(band, first_row, first_token, i, start):
                    sums[r][t].set(
                        e.fma(
                            self.dot(products).to("sitofp", self.lanes),
                            self._factor(r, t),
                            sums[r][t].get(),
                        )
                    )
        totals = [[e.reduce_add(sum_.get()) for sum_ in row] for row in sums]
        self._write(band, first_row, first_token, totals, corrections)

    def _variables(self, first: Value) -> list[list[Variable]]:
        """One for each row and token."""
        return [[self.e.variable(first) for _ in range(self.n_tokens)] for _ in range(self.n_rows)]

    def _corrections(self) -> list[Variable]:
        """What zero points contribute, for each token."""
        return [
            self.e.variable(self.e.constant(vector(F32, self.n_rows), 0.0))
            for _ in range(self.n_tokens)
        ]

    def _factors(
        self,
        band: Value,
        first_row: Value,
        first_token: Value,
        column: Value,
        x_group: Value,
        corrections: list[Variable],
    ) -> None:
        """Scale of the weight times scale of the activations, and the share of the zero points."""
        e, per_row = self.e, vector(F32, self.n_rows)
        place = (
            (band * self.n_groups + column // e.argument("columns_per_group")) * 16 + first_row
        ) * 4
        scale = e.load(per_row, e.pointer("scale"), place)
        for t in range(self.n_tokens):
            x_place = ((first_token + t) * self.x_groups + x_group) * 4
            x_scale, x_sum = (
                e.load(F32, e.pointer("x_scale"), x_place),
                e.load(F32, e.pointer("x_sum"), x_place),
            )
            e.store(scale * e.splat(x_scale, self.n_rows), self.factors, 64 * t)
            if self.asymmetric:
                share, weight = e.load(per_row, e.pointer("shift"), place), x_sum * x_scale
            else:
                share, weight = scale, x_sum * x_scale * float(-self.offset)
            corrections[t].set(e.fma(share, e.splat(weight, self.n_rows), corrections[t].get()))

    def _factor(self, row: int, token: int) -> Value:
        return self.e.splat(
            self.e.load(F32, self.factors, 64 * token + 4 * row, align=4), self.width // 4
        )

    def _products(
        self, band: Value, first_row: Value, first_token: Value, i: Value, start: int
    ) -> Iterator[tuple[int, int, list[tuple[Value, Value]]]]:
        """For each row and token its number and the pairs of vectors to multiply, of the columns of
        a block from `start` on."""
        e, columns = self.e, range(start, start + self.span)
        block = e.at(e.pointer("codes"), (band * self.n_blocks + i) * self.layout.block_bytes)
        x = []
        for t in range(self.n_tokens):
            place = (first_token + t) * (
                self.n_blocks * self.layout.columns
            ) + i * self.layout.columns
            x.append(
                [
                    e.load(vector(I8, self.width), e.pointer("x"), place + column)
                    for column in range(columns.start, columns.stop, self.width)
                ]
            )
        for r in range(self.n_rows):
            if start == 0:
                self._prefetch(block, first_row, i, r)
            codes = self.rows.codes(block, first_row + r, columns)
            for t in range(self.n_tokens):
                yield r, t, list(zip(codes, x[t], strict=True))

    def _prefetch(self, block: Value, first_row: Value, i: Value, row: int) -> None:
        """Where a pass takes all rows of a band, what it reads soon; else its share of the next
        band, in order, since memory is slow at giving every fourth quarter of a kilobyte."""
        if self.n_rows == 16:
            self.e.prefetch(block, (first_row + row) * 64 + AHEAD)
        else:
            band_bytes = self.n_blocks * self.layout.block_bytes
            start_of_band = self.e.at(block, self.e.constant(I64, 0) - i * self.layout.block_bytes)
            self.e.prefetch(
                start_of_band,
                band_bytes + (first_row * self.n_blocks + i * self.n_rows + row) * 64,
                level=2,
            )

    def _write(
        self,
        band: Value,
        first_row: Value,
        first_token: Value,
        totals: list[list[Value]],
        corrections: list[Variable],
    ) -> None:
        e, n = self.e, self.e.argument("n")
        for t in range(self.n_tokens):
            e.store(corrections[t].get(), self.factors, 64 * t)
            for r in range(self.n_rows):
                row = band * 16 + first_row + r
                total = totals[r][t] + e.load(F32, self.factors, 64 * t + 4 * r, align=4)
                place = (first_token + t) * n + row
                with e.when(row.less(n)):
                    if self.to_bf16:
                        e.store(
                            (rounded(total) >> 16).to("trunc", I16), e.pointer("out"), place * 2
                        )
                    else:
                        e.store(total, e.pointer("out"), place * 4)


class WholeBlock(Block):
    """With one scale per row and one per token, sums stay integers over all of K."""

    def __call__(self, band: Value, first_row: Value, first_token: Value) -> None:
        e, none = self.e, self.e.constant(I64, 0)
        sums = self._variables(e.constant(self.dot.sums, 0))
        with e.loop(0, self.n_blocks) as i:
            for start in range(0, self.layout.columns, self.span):
                for r, t, products in self._products(band, first_row, first_token, i, start):
                    sums[r][t].set(self.dot(products, sums[r][t].get()))
        corrections = self._corrections()
        self._factors(band, first_row, first_token, none, none, corrections)
        scalar = [
            [
                e.call(f"llvm.vector.reduce.add.v{self.width // 4}i32", I32, sum_.get()).to(
                    "sitofp", F32
                )
                for sum_ in row
            ]
            for row in sums
        ]
        totals = [
            [
                value * e.load(F32, self.factors, 64 * t + 4 * r, align=4)
                for t, value in enumerate(row)
            ]
            for r, row in enumerate(scalar)
        ]
        self._write(band, first_row, first_token, totals, corrections)


def gemm_kernel(
    form: str, bits: int, group: int, asymmetric: bool, offset: int, to_bf16: bool
) -> str:
    """float32 or bfloat16 `out [m, n]` from packed codes and what `quantize_kernel` made. group:
    32, 64 or 128, the group of the activations, or 0 for all of K on both sides, with one x_scale
    and x_sum per token; `columns_per_group`, a multiple of it, is that of the weight."""
    e = Emitter(GEMM_ARGUMENTS)
    m, kind = e.argument("m"), Block if group else WholeBlock
    one, many = (
        kind(e, form, bits, group, asymmetric, offset, to_bf16, rows, tokens)
        for rows, tokens in BLOCKING[form]
    )
    whole = m // many.n_tokens * many.n_tokens
    with e.share_bands() as band:
        with e.loop(0, whole, many.n_tokens) as token, e.loop(0, 16, many.n_rows) as row:
            many(band, row, token)
        with e.loop(whole, m) as token, e.loop(0, 16, one.n_rows) as row:
            one(band, row, token)
    return e.finish()
