"""Attention of one new token, from a bfloat16 cache, in one kernel.

torch's attention on a CPU starts two matrix products per head, which for one token is nearly all that it does: 0.4 ms per layer at 32 heads and 130 tokens on a Zen 4, as much as two of the layer's
INT4 products. Here a thread takes a head of keys and values, and for each of the query heads that share it passes over the keys once, over the scores twice and over the values once. All sums are
float32; the weights of the softmax are not rounded to bfloat16 in between.

A word of 32 bits holds two neighbouring columns; as float32, one is the word shifted up and the other the word masked, so no conversion instruction is needed and any AVX2 runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmq_kernels import jit
from llmq_kernels.emit import F32, I32, Emitter, Value, vector

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
    "n_tokens",
    "n_padded",
    "key_batch",
    "key_head",
    "key_token",
    "value_batch",
    "value_head",
    "value_token",
)
FLOATS, WORDS = vector(F32, 16), vector(I32, 16)
LEAST = -3e38  # a score that weighs nothing
# 2^f for f in [-0.5, 0.5] to 1e-7: ln(2)^n / n!
EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)


def halves(words: Value) -> tuple[Value, Value]:
    """Even and odd columns of 16 words as float32."""
    return (words << 16).cast(FLOATS), (words & 0xFFFF0000).cast(FLOATS)


def exp2(e: Emitter, y: Value) -> Value:
    """2^y for y <= 0; 2^-126 below."""
    y = e.call("llvm.maxnum.v16f32", FLOATS, y, e.constant(FLOATS, -126.0))
    whole = e.call("llvm.rint.v16f32", FLOATS, y)
    fraction, power = y - whole, e.constant(FLOATS, EXP2[0])
    for coefficient in EXP2[1:]:
        power = e.fma(power, fraction, e.constant(FLOATS, coefficient))
    return power * ((whole.to("fptosi", WORDS) + 127) << 23).cast(FLOATS)


def _rounded(values: Value) -> Value:
    """The upper halves of words: float32 rounded to bfloat16, ties to even."""
    bits = values.cast(WORDS)
    return bits + ((bits >> 16) & 1) + 0x7FFF


def decode_kernel(head_dim: int) -> str:
    """bfloat16 `out [batch, heads, D]` from queries of the same shape and keys and values with strides in bytes. scaling: of the scores, over ln(2). scores: float32 `[n_items, n_padded]`, scratch."""
    e = Emitter(ARGUMENTS)
    parts, n_shared, n_tokens, n_padded = range(head_dim // 32), e.argument("n_shared"), e.argument("n_tokens"), e.argument("n_padded")
    n_kv_heads = e.argument("n_kv_heads")
    with e.share(e.argument("n_items")) as item:
        batch, head = item // n_kv_heads, item - item // n_kv_heads * n_kv_heads
        keys, values = (e.at(e.pointer(name), batch * e.argument(f"{name}_batch") + head * e.argument(f"{name}_head")) for name in ("key", "value"))
        scores = e.at(e.pointer("scores"), item * n_padded * 4)
        with e.loop(0, n_shared) as shared:
            place = (item * n_shared + shared) * (2 * head_dim)
            scaling = e.splat(e.number("scaling"), 16)
            queries = [half * scaling for part in parts for half in halves(e.load(WORDS, e.pointer("query"), place + 64 * part))]
            with e.loop(0, n_tokens) as token:
                total = e.constant(FLOATS, 0.0)
                columns = [half for part in parts for half in halves(e.load(WORDS, keys, token * e.argument("key_token") + 64 * part))]
                for query, column in zip(queries, columns, strict=True):
                    total = e.fma(query, column, total)
                e.store(e.reduce_add(total), scores, token * 4)
            with e.loop(n_tokens, n_padded) as token:
                e.store(e.constant(F32, LEAST), scores, token * 4)
            norm = _softmax(e, scores, n_padded)
            sums = [e.variable(e.constant(FLOATS, 0.0)) for _ in queries]
            with e.loop(0, n_tokens) as token:
                weight = e.splat(e.load(F32, scores, token * 4), 16)
                columns = [half for part in parts for half in halves(e.load(WORDS, values, token * e.argument("value_token") + 64 * part))]
                for sum_, column in zip(sums, columns, strict=True):
                    sum_.set(e.fma(weight, column, sum_.get()))
            scale = e.splat(e.constant(F32, 1.0) / norm, 16)
            for part in parts:
                even, odd = (_rounded(sum_.get() * scale) for sum_ in sums[2 * part : 2 * part + 2])
                e.store((even >> 16) | (odd & 0xFFFF0000), e.pointer("out"), place + 64 * part)
    return e.finish()


def _softmax(e: Emitter, scores: Value, n_padded: Value) -> Value:
    """Scores to `2^(score - largest)` in place; returns their sum."""
    largest, total = e.variable(e.constant(FLOATS, LEAST)), e.variable(e.constant(FLOATS, 0.0))
    with e.loop(0, n_padded, 16) as token:
        largest.set(e.call("llvm.maxnum.v16f32", FLOATS, largest.get(), e.load(FLOATS, scores, token * 4)))
    top = e.splat(e.call("llvm.vector.reduce.fmax.v16f32", F32, largest.get()), 16)
    with e.loop(0, n_padded, 16) as token:
        weights = exp2(e, e.load(FLOATS, scores, token * 4) - top)
        e.store(weights, scores, token * 4)
        total.set(total.get() + weights)
    return e.reduce_add(total.get())


# --- for torch ------------------------------------------------------------------------------------------------------------


def form() -> str | None:
    """The form of the kernel that this CPU runs, or None."""
    return next((name for name in ("avx512vnni", "avx2") if jit.supports(name)), None)


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernel cannot take bfloat16 query `[B, H, 1, D]`, key and value `[B, H_kv, T, D]`, or None."""
    if any(tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" for tensor in (query, key, value)):
        return "it takes bfloat16 tensors on the CPU only"
    if query.shape[2] != 1 or query.shape[3] % 32 or value.shape[3] != query.shape[3] or key.shape[2] == 0:
        return f"it takes one query token and heads of a multiple of 32 columns only, not {list(query.shape)}"
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "it takes keys and values whose columns lie side by side only"
    return jit.missing() or (None if form() else "this CPU has no AVX2")


def decode(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`softmax(query @ key.T * scaling) @ value` as bfloat16 `[B, H, 1, D]`, for what `refusal` has no objection to."""
    (batch, n_heads, _, head_dim), (n_kv_heads, n_tokens) = query.shape, key.shape[1:3]
    query, n_padded = query.contiguous(), -(-n_tokens // 16) * 16
    out = torch.empty_like(query)
    scores = torch.empty(batch * n_kv_heads, n_padded)
    strides = [2 * tensor.stride(dim) for tensor in (key, value) for dim in range(3)]
    kernel: Callable[..., None] = jit.kernel(str(form()), "cpu_attention", "decode_kernel", head_dim)
    pointers = [tensor.data_ptr() for tensor in (query, key, value, out, scores)]
    kernel(*pointers, jit.float_bits(scaling / math.log(2)), batch * n_kv_heads, n_kv_heads, n_heads // n_kv_heads, n_tokens, n_padded, *strides)
    return out
