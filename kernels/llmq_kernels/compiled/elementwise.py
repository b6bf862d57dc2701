"""What a decoder layer does between its products, for one token in bfloat16: normalize, rotate,
gate, add.

Each is one pass over a few kilobytes, which torch does as well, but as five operations of a
microsecond's work and four microseconds' start each. Numbers are rounded to bfloat16 wherever
transformers' modules round them, so both ways differ by the order of one sum at most."""

from __future__ import annotations

from llmq_kernels.compiled.bfloat16 import (
    FLOATS,
    LOG2_E,
    WORDS,
    exp2,
    load_bf16,
    store_bf16,
    to_bf16,
)
from llmq_kernels.compiled.emit import F32, I64, Emitter, Value

UNDERFLOW = 0x42AE0000  # 87.0 as float32: e^-87 is the last power that is not denormal
NORM_ARGUMENTS = ("x", "delta", "weight", "out", "eps", "rows", "k")
ROTATE_ARGUMENTS = (
    "query",
    "key",
    "value",
    "cosine",
    "sine",
    "keys",
    "values",
    "n_tokens",
    "n_heads",
    "n_kv_heads",
    "key_head",
    "key_token",
    "value_head",
    "value_token",
)
GATE_ARGUMENTS = ("gate", "up", "out", "n")
ADD_ARGUMENTS = ("x", "bias", "n")


def norm_kernel(adds: bool) -> str:
    """RMSNorm of `x [rows, k]`: `out = weight * (x / sqrt(mean(x^2) + eps))`. adds: delta is added
    to x first, in place: the residual stream. k is a multiple of 16."""
    e = Emitter(NORM_ARGUMENTS)
    k = e.argument("k")
    with e.share(e.argument("rows")) as row:
        x, out = (e.at(e.pointer(name), row * k * 2) for name in ("x", "out"))
        squares = e.variable(e.constant(FLOATS, 0.0))
        with e.loop(0, k, 16) as i:
            values = load_bf16(e, x, i * 2)
            if adds:
                values = to_bf16(
                    values + load_bf16(e, e.at(e.pointer("delta"), row * k * 2), i * 2)
                )
                store_bf16(e, values, x, i * 2)
            squares.set(e.fma(values, values, squares.get()))
        mean = e.reduce_add(squares.get()) / k.to("sitofp", F32)
        scale = e.splat(
            e.constant(F32, 1.0) / e.call("llvm.sqrt.f32", F32, mean + e.number("eps")), 16
        )
        with e.loop(0, k, 16) as i:
            store_bf16(
                e,
                load_bf16(e, e.pointer("weight"), i * 2) * to_bf16(load_bf16(e, x, i * 2) * scale),
                out,
                i * 2,
            )
    return e.finish()


def rotate_kernel(head_dim: int) -> str:
    """Rotary position embedding of query `[heads, D]`, in place, and of key `[kv heads, D]` on its
    way into the cache, where value goes, too. cosine and sine `[D]`; `n_tokens` is where the number
    of tokens is, the new one included; strides of the caches in bytes. D is a multiple of 32."""
    e = Emitter(ROTATE_ARGUMENTS)
    place = e.load(I64, e.pointer("n_tokens")) - 1

    def rotate(source: Value, target: Value) -> None:
        for i in range(0, head_dim // 2, 16):
            low, high = (load_bf16(e, source, 2 * column) for column in (i, i + head_dim // 2))
            for column, value, other in (
                (i, low, e.constant(FLOATS, 0.0) - high),
                (i + head_dim // 2, high, low),
            ):
                cosine, sine = (
                    load_bf16(e, e.pointer(name), 2 * column) for name in ("cosine", "sine")
                )
                store_bf16(e, to_bf16(value * cosine) + to_bf16(other * sine), target, 2 * column)

    with e.loop(0, e.argument("n_heads")) as head:
        query = e.at(e.pointer("query"), head * (2 * head_dim))
        rotate(query, query)
    with e.loop(0, e.argument("n_kv_heads")) as head:
        rotate(
            e.at(e.pointer("key"), head * (2 * head_dim)),
            e.at(
                e.pointer("keys"), head * e.argument("key_head") + place * e.argument("key_token")
            ),
        )
        target = e.at(
            e.pointer("values"), head * e.argument("value_head") + place * e.argument("value_token")
        )
        for i in range(0, 2 * head_dim, 64):
            e.store(e.load(WORDS, e.pointer("value"), head * (2 * head_dim) + i), target, i)
    return e.finish()


def gate_kernel() -> str:
    """`out = silu(gate) * up` for vectors of n, a multiple of 16."""
    e = Emitter(GATE_ARGUMENTS)
    sign, one = e.constant(WORDS, 0x7FFFFFFF), e.constant(FLOATS, 1.0)
    with e.loop(0, e.argument("n"), 16) as i:
        gate = load_bf16(e, e.pointer("gate"), i * 2)
        size = gate.cast(WORDS) & sign
        # e^-|gate|, which cannot overflow; floats that are not negative are ordered like their bits
        small = e.select(
            size.less(UNDERFLOW), exp2(e, size.cast(FLOATS) * -LOG2_E), e.constant(FLOATS, 0.0)
        )
        share = e.select(gate.cast(WORDS).less(0), small, one) / (one + small)
        store_bf16(
            e, to_bf16(gate * share) * load_bf16(e, e.pointer("up"), i * 2), e.pointer("out"), i * 2
        )
    return e.finish()


def add_kernel() -> str:
    """`x += bias` for vectors of n, a multiple of 16."""
    e = Emitter(ADD_ARGUMENTS)
    x = e.pointer("x")
    with e.loop(0, e.argument("n"), 16) as i:
        store_bf16(e, load_bf16(e, x, i * 2) + load_bf16(e, e.pointer("bias"), i * 2), x, i * 2)
    return e.finish()
