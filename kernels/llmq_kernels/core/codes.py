"""What a stored integer means.

A weight is `scale * (code - zero)` with an unsigned `code` in `0 .. levels - 1`. Where no zero
point is stored, `zero` is the code's `offset`: 2^(b-1) for the symmetric integer codes, 1 for
ternary. Unsigned storage is what int32 words, the CPU instructions (u8 x s8) and the magic-number
dequantization of the GPU kernels want, so signs live in the offset alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """One kind of stored integer.

    name: as written in recipes and checkpoints. bits: width in storage. levels: number of codes in
    use. offset: the code that stands for zero when symmetric."""

    name: str
    bits: int
    levels: int
    offset: float

    @property
    def max(self) -> int:
        """The largest code."""
        return self.levels - 1

    @property
    def has_zero_points(self) -> bool:
        """Whether a zero point of its own may be stored for each scale: for codes that use their
        whole width and count whole steps."""
        return self.levels == 1 << self.bits and self.offset % 1 == 0


# All codes. A new one is a row: `reference` computes it, the llmq format stores it, and every other
# backend and format refuses it until it declares it.
_TABLE = (
    Code("int8", 8, 256, 128.0),
    Code("int6", 6, 64, 32.0),
    Code("int5", 5, 32, 16.0),
    Code("int4", 4, 16, 8.0),
    Code("int3", 3, 8, 4.0),
    Code("int2", 2, 4, 2.0),
    Code("int2h", 2, 4, 1.5),  # -1.5, -0.5, 0.5 and 1.5 steps: no zero, as many below as above
    Code("ternary", 2, 3, 1.0),
)
CODES: dict[str, Code] = {code.name: code for code in _TABLE}
