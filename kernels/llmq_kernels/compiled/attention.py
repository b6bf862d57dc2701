"""Attention of one new token, from a bfloat16 cache, in one kernel.

torch's attention on a CPU starts two matrix products per head, which for one token is nearly all
that it does: 0.4 ms per layer at 32 heads and 130 tokens on a Zen 4, as much as two of the layer's
INT4 products. Here a thread takes a head of keys and values, and for each of the query heads that
share it passes over the keys once, over the scores twice and over the values once. All sums are
float32; the weights of the softmax are not rounded to bfloat16 in between.

A word of 32 bits holds two neighbouring columns; as float32, one is the word shifted up and the
other the word masked, so no conversion instruction is needed and any AVX2 runs it."""

from __future__ import annotations

from llmq_kernels.compiled.bfloat16 import FLOATS, WORDS, exp2, halves, joined
from llmq_kernels.compiled.emit import F32, I64, Emitter, Value

ARGUMENTS = (
    "query",
    "key",
    "value",
    "out",
    "scores",
    "scaling",
    "n_items",
    "n_kv_heads",
    "n_shared",
    "length",
    "row_length",
    "key_batch",
    "key_head",
    "key_token",
    "value_batch",
    "value_head",
    "value_token",
)
LEAST = -3e38  # a score that weighs nothing


def decode_kernel(head_dim: int) -> str:
    """bfloat16 `out [batch, heads, D]` from queries of the same shape and keys and values with
    strides in bytes. scaling: of the scores, over ln(2). length: where the number of tokens is, so
    that a recorded call can see more of them. scores: float32 `[n_items, row_length]`, scratch;
    rows a multiple of 16."""
    e = Emitter(ARGUMENTS)
    parts, n_shared, n_kv_heads = (
        range(head_dim // 32),
        e.argument("n_shared"),
        e.argument("n_kv_heads"),
    )
    n_tokens = e.load(I64, e.pointer("length"))
    n_padded = (n_tokens + 15) // 16 * 16
    with e.share(e.argument("n_items")) as item:
        batch, head = item // n_kv_heads, item - item // n_kv_heads * n_kv_heads
        keys, values = (
            e.at(
                e.pointer(name),
                batch * e.argument(f"{name}_batch") + head * e.argument(f"{name}_head"),
            )
            for name in ("key", "value")
        )
        scores = e.at(e.pointer("scores"), item * e.argument("row_length") * 4)
        with e.loop(0, n_shared) as shared:
            place = (item * n_shared + shared) * (2 * head_dim)
            scaling = e.splat(e.number("scaling"), 16)
            queries = [
                half * scaling
                for part in parts
                for half in halves(e.load(WORDS, e.pointer("query"), place + 64 * part))
            ]
            with e.loop(0, n_tokens) as token:
                total = e.constant(FLOATS, 0.0)
                columns = [
                    half
                    for part in parts
                    for half in halves(
                        e.load(WORDS, keys, token * e.argument("key_token") + 64 * part)
                    )
                ]
                for query, column in zip(queries, columns, strict=True):
                    total = e.fma(query, column, total)
                e.store(e.reduce_add(total), scores, token * 4)
            with e.loop(n_tokens, n_padded) as token:
                e.store(e.constant(F32, LEAST), scores, token * 4)
            norm = _softmax(e, scores, n_padded)
            sums = [e.variable(e.constant(FLOATS, 0.0)) for _ in queries]
            with e.loop(0, n_tokens) as token:
                weight = e.splat(e.load(F32, scores, token * 4), 16)
                columns = [
                    half
                    for part in parts
                    for half in halves(
                        e.load(WORDS, values, token * e.argument("value_token") + 64 * part)
                    )
                ]
                for sum_, column in zip(sums, columns, strict=True):
                    sum_.set(e.fma(weight, column, sum_.get()))
            scale = e.splat(e.constant(F32, 1.0) / norm, 16)
            for part in parts:
                even, odd = (sum_.get() * scale for sum_ in sums[2 * part : 2 * part + 2])
                e.store(joined(even, odd), e.pointer("out"), place + 64 * part)
    return e.finish()


def _softmax(e: Emitter, scores: Value, n_padded: Value) -> Value:
    """Scores to `2^(score - largest)` in place; returns their sum."""
    largest, total = e.variable(e.constant(FLOATS, LEAST)), e.variable(e.constant(FLOATS, 0.0))
    with e.loop(0, n_padded, 16) as token:
        largest.set(
            e.call("llvm.maxnum.v16f32", FLOATS, largest.get(), e.load(FLOATS, scores, token * 4))
        )
    top = e.splat(e.call("llvm.vector.reduce.fmax.v16f32", F32, largest.get()), 16)
    with e.loop(0, n_padded, 16) as token:
        weights = exp2(e, e.load(FLOATS, scores, token * 4) - top)
        e.store(weights, scores, token * 4)
        total.set(total.get() + weights)
    return e.reduce_add(total.get())
