"""Rounding activations to INT8 on their way into the integer kernels."""

from __future__ import annotations

from llmq_kernels.compiled.bfloat16 import load_bf16
from llmq_kernels.compiled.emit import F32, I8, I32, Emitter, Value, vector

QUANTIZE_ARGUMENTS = ("x", "codes", "scale", "sum", "m", "k", "span", "group")


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
