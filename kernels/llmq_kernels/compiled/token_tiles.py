"""Activations as token tiles, and sums of token tiles as outputs: what kernels for many tokens do
before and after their products.

A token tile holds 16 tokens and 64 bytes of columns of each, transposed in words of four bytes:
`[16 words of columns, 16 tokens]`, pairs of bfloat16 or quadruples of int8. A product adds `[16
rows, 16 tokens]` of sums, one line of 64 bytes per row, which are transposed back on the way out.
"""

from __future__ import annotations

from typing import Any

from llmq_kernels.compiled.emit import BF16, F32, I16, I32, I64, Emitter, Value, vector

TILE = 1024  # bytes
BF16_PACK_ARGUMENTS = ("x", "tiles", "m", "n_chunks", "row_bytes")
INT8_PACK_ARGUMENTS = ("codes", "tiles", "m", "n_chunks")
FLOATS = vector(F32, 16)


def transpose(e: Emitter, rows: list[Value]) -> list[Value]:
    """16 vectors of 16 lanes, transposed in four rounds of exchanging blocks between rows."""
    for width in (8, 4, 2, 1):
        low = [
            (lane // width % 2) * 16 + lane // (2 * width) * 2 * width + lane % width
            for lane in range(16)
        ]
        high = [lane + width for lane in low]
        after = list(rows)
        for i in range(16):
            if i // width % 2 == 0:
                after[i], after[i + width] = (
                    rows[i].shuffle(low, rows[i + width]),
                    rows[i].shuffle(high, rows[i + width]),
                )
        rows = after
    return rows


def bf16_pack_kernel() -> str:
    """Activations bfloat16 `[m, k]` as tiles `[token tiles, k / 32, 16, 16, 2]` in the order of
    columns in which weights are expanded: even ones of each 64, then odd ones, in pairs. Tokens
    that pad the last tile repeat the last token; nobody reads their sums."""
    e = Emitter(BF16_PACK_ARGUMENTS)
    x, tiles, m, n_chunks, row_bytes = (
        e.pointer("x"),
        e.pointer("tiles"),
        e.argument("m"),
        e.argument("n_chunks"),
        e.argument("row_bytes"),
    )
    words = vector(I32, 16)
    with e.share((m + 15) // 16) as token_tile, e.loop(0, n_chunks) as chunk:
        even, odd = [], []
        for i in range(16):
            token = token_tile * 16 + i
            row = e.select(token.less(m), token, m - 1) * row_bytes + chunk * 128
            first, second = e.load(words, x, row), e.load(words, x, row + 64)
            a, b = (
                first.shuffle(list(range(0, 32, 2)), second),
                first.shuffle(list(range(1, 32, 2)), second),
            )
            even.append((a & 0xFFFF) | (b << 16))
            odd.append((a >> 16) | (b & 0xFFFF0000))
        target = (token_tile * n_chunks + chunk) * (2 * TILE)
        for offset, rows in ((0, even), (TILE, odd)):
            for r, row in enumerate(transpose(e, rows)):
                e.store(row, tiles, target + (offset + 64 * r), align=64)
    return e.finish()


def int8_pack_kernel() -> str:
    """int8 activations `[m, k]` as tiles `[token tiles, k / 64, 16, 16, 4]`. Tokens that pad the
    last tile repeat the last token."""
    e = Emitter(INT8_PACK_ARGUMENTS)
    m, n_chunks = e.argument("m"), e.argument("n_chunks")
    with e.share((m + 15) // 16) as i, e.loop(0, n_chunks) as chunk:
        rows = [
            e.load(
                vector(I32, 16),
                e.pointer("codes"),
                (e.minimum(i * 16 + r, m - 1) * n_chunks + chunk) * 64,
            )
            for r in range(16)
        ]
        for r, row in enumerate(transpose(e, rows)):
            e.store(row, e.pointer("tiles"), (i * n_chunks + chunk) * TILE + 64 * r, align=64)
    return e.finish()


def store_line(
    e: Emitter, element: Any, lines: Value, line: Value, place: Value, n_lanes: Value
) -> None:
    """One of the lines of 16 elements to the output from element `place` on; only the first lanes
    where fewer are left of the row."""
    size = 2 if element == I16 else 4
    with e.when(n_lanes.less(16)), e.loop(0, n_lanes) as lane:
        e.store(
            e.load(element, lines, (line * 16 + lane) * size),
            e.pointer("out"),
            (place + lane) * size,
        )
    with e.when(e.constant(I64, 15).less(n_lanes)):
        e.store(
            e.load(vector(element, 16), lines, line * (16 * size), align=16 * size),
            e.pointer("out"),
            place * size,
        )


class BF16Writer:
    """16 rows x 16 tokens of sums to the output, where they are transposed and rounded. 8-bit rows
    are scaled here."""

    def __init__(self, e: Emitter, sums: Value, row_scaled: bool) -> None:
        self.e, self.sums, self.row_scaled, self.rounded = e, sums, row_scaled, e.buffer(16 * 32)

    def __call__(self, band: Value, tokens: Value, place: Value) -> None:
        e, floats = self.e, FLOATS
        n, m = e.argument("n"), e.argument("m")
        by_token = transpose(
            e, [e.load(floats, self.sums, place * TILE + 64 * row, align=64) for row in range(16)]
        )
        for token, values in enumerate(by_token):
            scaled = (
                values * e.load(floats, e.pointer("scale"), band * 64)
                if self.row_scaled
                else values
            )
            e.store(scaled.to("fptrunc", vector(BF16, 16)), self.rounded, 32 * token, align=32)
        first = tokens * 16
        with e.loop(0, e.minimum(m - first, e.constant(I64, 16))) as i:
            store_line(e, I16, self.rounded, i, (first + i) * n + band * 16, n - band * 16)


def write_floats(
    e: Emitter, sums: Value, lines: Value, band: Value, tokens: Value, place: Value
) -> None:
    """16 rows x 16 tokens of sums to the output, transposed."""
    n = e.argument("n")
    for token, values in enumerate(
        transpose(e, [e.load(FLOATS, sums, place + 64 * row, align=64) for row in range(16)])
    ):
        e.store(values, lines, 64 * token, align=64)
    with e.loop(0, e.minimum(e.argument("m") - tokens * 16, e.constant(I64, 16))) as i:
        store_line(e, F32, lines, i, (tokens * 16 + i) * n + band * 16, n - band * 16)
