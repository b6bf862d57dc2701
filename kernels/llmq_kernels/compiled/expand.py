"""Expanding packed codes to bfloat16 weights.

The 4, 8 or 16 possible values of a group, `bfloat16(scale * (code - zero))`, lie in a register, and
one permutation looks up 32 of them. Codes of 8 bits become bfloat16 integers, `code - 128`, as they
are, and rows are scaled at the end. Expanded columns come in the order in which bytes lie in
memory: of each 64 first the even ones, then the odd ones."""

from __future__ import annotations

from llmq_kernels.compiled.emit import BF16, F32, I1, I8, I16, I32, Emitter, Value, vector
from llmq_kernels.compiled.layout import Layout
from llmq_kernels.compiled.token_tiles import TILE

AHEAD = 4096  # bytes of codes to fetch ahead of their use


def table(e: Emitter, bits: int, scale: Value, shift: Value | None, offset: int) -> Value:
    """The values of all codes of a group as 16 bfloat16 lanes: `scale * code + shift`, or `scale *
    (code - offset)`. Codes of fewer than 4 bits repeat, so that bits above them do not matter."""
    floats = vector(F32, 16)
    codes = [lane % (1 << bits) for lane in range(16)]
    if shift is None:
        values = e.constant(floats, [float(code - offset) for code in codes]) * e.splat(scale, 16)
    else:
        values = e.fma(
            e.constant(floats, [float(code) for code in codes]),
            e.splat(scale, 16),
            e.splat(shift, 16),
        )
    return values.to("fptrunc", vector(BF16, 16)).cast(vector(I16, 16))


def _indices(e: Emitter, bits: int, block: Value, row: Value, chunk: int) -> tuple[Value, Value]:
    """The 64 codes of a chunk of one row as 2 x 32 table indices, those of even columns and those
    of odd ones. What lies above the code's bits is arbitrary."""
    low = e.load(vector(I16, 32), block, row * 64)
    if bits != 3:
        return low >> (bits * chunk), low >> (bits * chunk + 8)
    high = e.load(vector(I1, 64), block, row * 32 + (16 * 64 + 8 * chunk))
    bytes64 = vector(I8, 64)
    codes = ((low >> (2 * chunk)) & 0x0303).cast(bytes64) | e.select(
        high, e.constant(bytes64, 4), e.constant(bytes64, 0)
    )
    indices = codes.cast(vector(I16, 32))
    return indices, indices >> 8


class Expander:
    """Reads rows of a band's blocks. group: 32, 64, or 128 for all multiples of 128, whose size is
    an argument of the kernel."""

    def __init__(self, e: Emitter, bits: int, group: int, asymmetric: bool, offset: int) -> None:
        self.e, self.bits, self.group, self.asymmetric, self.offset = (
            e,
            bits,
            group,
            asymmetric,
            offset,
        )
        self.scale, self.shift = e.pointer("scale"), e.pointer("shift")
        self.columns_per_group, self.n_groups = (
            e.argument("columns_per_group"),
            e.argument("n_groups"),
        )

    def _table(self, band: Value, column: Value, row: Value) -> Value:
        """The table of the group that a column of a row is in."""
        place = ((band * self.n_groups + column // self.columns_per_group) * 16 + row) * 4
        shift = self.e.load(F32, self.shift, place, align=4) if self.asymmetric else None
        return table(
            self.e, self.bits, self.e.load(F32, self.scale, place, align=4), shift, self.offset
        )

    def row(self, block: Value, band: Value, column: Value, row: Value) -> list[Value]:
        """One row of a block, 32 columns in a vector. block: address of its codes; column: its
        first column."""
        e = self.e
        e.prefetch(block, row * 64 + AHEAD)
        values = e.constant(vector(I16, 32), 0)
        expanded: list[Value] = []
        for chunk in range(Layout(self.bits, 1, 1).fields):
            if chunk * 64 % self.group == 0 and self.bits != 8:
                values = self._tables(band, column + chunk * 64, row)
            expanded += (
                self._integers(block, row)
                if self.bits == 8
                else self._looked_up(values, _indices(e, self.bits, block, row, chunk))
            )
        return expanded

    def store_row(
        self, block: Value, band: Value, column: Value, row: Value, target: Value
    ) -> None:
        """The same into tiles of 16 rows x 32 columns, the block's first of which is at
        `target`."""
        for i, expanded in enumerate(self.row(block, band, column, row)):
            self.e.store(expanded, target, row * 64 + i * TILE, align=64)

    def _tables(self, band: Value, column: Value, row: Value) -> Value:
        """32 entries: the group's table twice, or those of two groups of 32."""
        first = self._table(band, column, row)
        return (
            first.shuffle(list(range(32)), self._table(band, column + 32, row))
            if self.group == 32
            else first.shuffle(list(range(16)) * 2)
        )

    def _looked_up(self, values: Value, pair: tuple[Value, Value]) -> list[Value]:
        indices = [self._within_half(one) if self.group == 32 else one for one in pair]
        return [
            self.e.call("llvm.x86.avx512.permvar.hi.512", vector(I16, 32), values, one)
            for one in indices
        ]

    def _within_half(self, indices: Value) -> Value:
        """The upper 16 lanes belong to the next group of 32, whose values are the upper 16 of the
        table."""
        return (indices & 15) | self.e.constant(vector(I16, 32), [0] * 16 + [16] * 16)

    def _integers(self, block: Value, row: Value) -> tuple[Value, Value]:
        """64 codes of 8 bits, `code - 128` as bfloat16: an integer of 8 bits is exact there, so the
        upper half of its float32 is it."""
        words = self.e.load(vector(I32, 16), block, row * 64) ^ 0x80808080
        a, b, c, d = (
            (words << (24 - 8 * byte)).sar(24).to("sitofp", vector(F32, 16)).cast(vector(I32, 16))
            for byte in range(4)
        )
        halves = ((a >> 16) | (c & 0xFFFF0000), (b >> 16) | (d & 0xFFFF0000))
        return halves[0].cast(vector(I16, 32)), halves[1].cast(vector(I16, 32))
