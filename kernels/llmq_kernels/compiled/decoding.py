"""The kernels of `attention` and `elementwise` for tensors: everything of a decoding step but
the products. All take bfloat16 on the CPU.

Every function only allocates and starts kernels, so `recording.Recording` can note it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmq_kernels.compiled import jit
from llmq_kernels.compiled.recording import NotRecordable
from llmq_kernels.compiled.threads import Kernel, float_bits
from llmq_kernels.core.errors import KernelDied

LANES = 16


def form() -> str | None:
    """The form of the kernels that this CPU runs, or None."""
    return next((name for name in ("avx512vnni", "avx2") if jit.supports(name)), None)


def missing() -> str | None:
    """Why none of this runs here, or None."""
    return jit.missing() or (None if form() else "this CPU has no AVX2")


# --- attention ------------------------------------------------------------------------------------


def attention_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernel cannot take bfloat16 query `[B, H, 1, D]`, key and value `[B, H_kv, T, D]`, or
    None."""
    if any(
        tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu"
        for tensor in (query, key, value)
    ):
        return "it takes bfloat16 tensors on the CPU only"
    if (
        query.shape[2] != 1
        or query.shape[3] % 32
        or value.shape[3] != query.shape[3]
        or key.shape[2] == 0
    ):
        return (
            "it takes one query token and heads of a multiple of 32 columns only, "
            f"not {list(query.shape)}"
        )
    if key.stride(3) != 1 or value.stride(3) != 1:
        return "it takes keys and values whose columns lie side by side only"
    if reason := missing():
        return reason
    try:
        _kernel("attention", "decode_kernel", query.shape[3])
    except NotRecordable as error:
        return str(error)
    return None


def score_buffer(key: Tensor) -> Tensor:
    """Scratch for the attention over keys `[B, H_kv, T, D]`, at most T of them."""
    return torch.empty(
        key.shape[0] * key.shape[1], -(-key.shape[2] // LANES) * LANES, dtype=torch.float32
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    n_tokens: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """`softmax(query @ key.T * scaling) @ value` as bfloat16 `[B, H, 1, D]`, for what
    `attention_refusal` has no objection to. n_tokens: an int64 number, read when the kernel runs,
    of the tokens in the cache that count; by default all. scores: a `score_buffer`, which layers
    that run one after the other can share."""
    (batch, n_heads, _, head_dim), (n_kv_heads, most) = query.shape, key.shape[1:3]
    query, scores = query.contiguous(), score_buffer(key) if scores is None else scores
    out = torch.empty_like(query)
    length = torch.tensor(most) if n_tokens is None else n_tokens
    strides = [2 * tensor.stride(dim) for tensor in (key, value) for dim in range(3)]
    pointers = [tensor.data_ptr() for tensor in (query, key, value, out, scores)]
    sizes = (
        batch * n_kv_heads,
        n_kv_heads,
        n_heads // n_kv_heads,
        length.data_ptr(),
        scores.shape[1],
    )
    _kernel("attention", "decode_kernel", head_dim)(
        *pointers, float_bits(scaling / math.log(2)), *sizes, *strides
    )
    return out


# --- between the products -------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension of x, to which delta is added first, in place."""
    k = _columns(x)
    out = torch.empty_like(x)
    pointers = (
        x.data_ptr(),
        0 if delta is None else delta.data_ptr(),
        _bf16(weight).data_ptr(),
        out.data_ptr(),
    )
    _kernel("elementwise", "norm_kernel", delta is not None)(
        *pointers, float_bits(eps), x.numel() // k, k, threads=1
    )
    return out


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    n_tokens: Tensor,
) -> None:
    """Rotary embedding of query `[.., heads * D]` in place; of key `[.., kv heads * D]` into
    `keys[0, :, n_tokens - 1]`, of caches `[1, kv heads, capacity, D]`; value into values."""
    head_dim = keys.shape[3]
    if head_dim % 32 or keys.stride(3) != 1 or values.stride(3) != 1:
        raise NotRecordable(
            f"a cache of heads of {head_dim} columns is not a multiple of 32 that lie side by side"
        )
    pointers = [
        _bf16(tensor).data_ptr() for tensor in (query, key, value, cosine, sine, keys, values)
    ]
    strides = [2 * tensor.stride(dim) for tensor in (keys, values) for dim in (1, 2)]
    _kernel("elementwise", "rotate_kernel", head_dim)(
        *pointers,
        n_tokens.data_ptr(),
        query.numel() // head_dim,
        keys.shape[1],
        *strides,
        threads=1,
    )


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of one row."""
    n = _columns(gate)
    out = torch.empty_like(gate)
    _kernel("elementwise", "gate_kernel")(
        gate.data_ptr(), _bf16(up).data_ptr(), out.data_ptr(), n, threads=1
    )
    return out


def add_bias(x: Tensor, bias: Tensor) -> None:
    """`x += bias` for x `[M, N]` and bias `[N]` of its dtype, on any device. One row in bfloat16 on
    a CPU has a kernel, so that a product with a bias can be recorded."""
    is_one_row = (
        x.shape[0] == 1
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.is_contiguous()
    )
    if is_one_row and x.shape[1] % LANES == 0 and missing() is None:
        _kernel("elementwise", "add_kernel")(x.data_ptr(), bias.data_ptr(), x.shape[1], threads=1)
    else:
        x.add_(bias)


def _columns(x: Tensor) -> int:
    if _bf16(x).shape[-1] % LANES:
        raise NotRecordable(f"{x.shape[-1]} columns are not a multiple of {LANES}")
    return x.shape[-1]


def _bf16(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise NotRecordable(f"the model computes in {x.dtype}, not bfloat16")
    return x


def _kernel(module: str, function: str, *parameters: object) -> Kernel:
    chosen = form()
    if chosen is None:
        raise NotRecordable(str(missing()))
    try:
        return jit.kernel(chosen, module, function, *parameters)
    except KernelDied as error:
        raise NotRecordable(str(error)) from None
