"""The inner step of the integer kernels: codes unpacked to bytes, and their products with bytes of
activations.

Three forms of the product, chosen by what the CPU has: `vpdpbusd` on 64 bytes (AVX512-VNNI), on 32
bytes (AVX-VNNI), and `vpmaddubsw` + `vpmaddwd` (AVX2). The last adds pairs in int16, where four
products of 4 bits stay below 2^15, and splits 8-bit codes into 7 + 1 bits."""

from __future__ import annotations

from llmq_kernels.compiled.emit import I1, I8, I16, I32, Emitter, Value, vector
from llmq_kernels.compiled.layout import Layout

AHEAD = 4096  # bytes of codes to fetch ahead of their use


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
