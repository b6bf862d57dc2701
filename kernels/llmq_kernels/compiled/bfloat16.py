"""bfloat16 as 16 float32 lanes and back, and 2^y."""

from __future__ import annotations

from llvmlite import ir

from llmq_kernels.compiled.emit import F32, I16, I32, Emitter, Value, vector

FLOATS, WORDS = vector(F32, 16), vector(I32, 16)
# 2^f for f in [-0.5, 0.5] to 1e-7: ln(2)^n / n!
EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
LOG2_E = 1.4426950408889634


def halves(words: Value) -> tuple[Value, Value]:
    """Even and odd columns of 16 words of two bfloat16 each, as float32."""
    return (words << 16).cast(FLOATS), (words & 0xFFFF0000).cast(FLOATS)


def joined(even: Value, odd: Value) -> Value:
    """The inverse of `halves`, rounded to even."""
    return (rounded(even) >> 16) | (rounded(odd) & 0xFFFF0000)


def load_bf16(e: Emitter, base: Value, offset: Value | int) -> Value:
    """16 bfloat16 as float32."""
    return (e.load(vector(I16, 16), base, offset).to("zext", WORDS) << 16).cast(FLOATS)


def store_bf16(e: Emitter, values: Value, base: Value, offset: Value | int) -> None:
    """16 float32, rounded to even, as bfloat16."""
    e.store((rounded(values) >> 16).to("trunc", vector(I16, 16)), base, offset)


def to_bf16(values: Value) -> Value:
    """float32 that bfloat16 can hold, rounded to even."""
    return (rounded(values) & 0xFFFF0000).cast(values.type)


def rounded(values: Value) -> Value:
    """Words whose upper halves are the bfloat16 of float32 numbers; integer arithmetic, so that any
    AVX2 runs it."""
    bits = values.cast(
        vector(I32, values.type.count) if isinstance(values.type, ir.VectorType) else I32
    )
    return bits + ((bits >> 16) & 1) + 0x7FFF


def exp2(e: Emitter, y: Value) -> Value:
    """2^y for y <= 0; 2^-126 below."""
    y = e.call("llvm.maxnum.v16f32", FLOATS, y, e.constant(FLOATS, -126.0))
    whole = e.call("llvm.rint.v16f32", FLOATS, y)
    fraction, power = y - whole, e.constant(FLOATS, EXP2[0])
    for coefficient in EXP2[1:]:
        power = e.fma(power, fraction, e.constant(FLOATS, coefficient))
    return power * ((whole.to("fptosi", WORDS) + 127) << 23).cast(FLOATS)
