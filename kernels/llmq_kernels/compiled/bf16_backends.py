"""The backends `cpu-amx` and `cpu-avx512`: bfloat16 activations as they are. Nothing is rounded but
the dequantized weight and the result, to bfloat16."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq_kernels.compiled import jit
from llmq_kernels.compiled.decoding import add_bias
from llmq_kernels.compiled.prepared import (
    base_group,
    layout_of,
    padded,
    prepare,
    restore,
    rows,
    weight_pointers,
    weight_sizes,
)
from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.capability import Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.weight import PackedWeight

_NARROW = Takes(
    devices=("cpu",),
    activations=("none",),
    dtypes=(torch.bfloat16,),
    codes=(CODES["int4"], CODES["int3"], CODES["int2"], CODES["ternary"]),
    groups=32,
    zero="byte",
)
# Codes of 8 bits become bfloat16 integers, and rows are scaled at the end.
TAKES = (_NARROW, replace(_NARROW, codes=(CODES["int8"],), groups=0, zero="none"))
# Tokens that are multiplied one by one without a tile unit; as many as the kernel takes.
AVX512_FEW = 8


def amx_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the tile unit cannot take a weight here, or None."""
    return jit.obstacle("amx", "this CPU or system has no AMX tiles for bfloat16")


def avx512_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the vector unit cannot take a weight here, or None."""
    return jit.obstacle("avx512bf16", "this CPU has no AVX512 instructions for bfloat16")


def amx_linear(x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for bfloat16 x `[M, K]`."""
    return _with_bias(_tiled(x, weight, state, "amx", "amx"), bias)


def avx512_linear(
    x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None = None
) -> Tensor:
    """`x @ W.T + bias` for bfloat16 x `[M, K]`."""
    if x.shape[0] > AVX512_FEW:
        return _with_bias(_tiled(x, weight, state, "avx512bf16", "avx512"), bias)
    return _with_bias(_few(x, weight, state), bias)


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        add_bias(out, bias.to(out.dtype))
    return out


def _few(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """Token by token."""
    m, layout = x.shape[0], layout_of(weight)
    x = padded(x, layout.k_padded)
    ordered, out = torch.empty_like(x), x.new_empty(m, weight.shape[0])
    order = jit.kernel("avx512bf16", "avx512", "order_kernel")
    order(x.data_ptr(), ordered.data_ptr(), m, layout.k_padded // 64, threads=1)
    kernel = jit.kernel("avx512bf16", "avx512", "few_kernel", *_parameters(weight))
    tokens = (ordered.data_ptr(), out.data_ptr(), weight.shape[0], m)
    kernel(*weight_pointers(state), *tokens, *weight_sizes(weight, state, m))
    return out


def _tiled(x: Tensor, weight: PackedWeight, state: State, form: str, module: str) -> Tensor:
    """By token tiles."""
    m, layout = x.shape[0], layout_of(weight)
    x = padded(x, layout.k_padded)
    out = x.new_empty(m, weight.shape[0])
    tiles = torch.empty(-(-m // 16) * 16 * layout.k_padded, dtype=torch.bfloat16)
    pack = jit.kernel("avx512vnni", "token_tiles", "bf16_pack_kernel")
    pack(x.data_ptr(), tiles.data_ptr(), m, layout.k_padded // 64, layout.k_padded * 2)
    kernel = jit.kernel(form, module, "gemm_kernel", *_parameters(weight))
    tokens = (tiles.data_ptr(), out.data_ptr(), weight.shape[0], m)
    kernel(*weight_pointers(state), *tokens, *weight_sizes(weight, state, m))
    return out


def _parameters(weight: PackedWeight) -> tuple[int, int, bool, int]:
    return weight.code.bits, base_group(weight), weight.zero is not None, int(weight.code.offset)


AMX = Backend("cpu-amx", TAKES, amx_obstacle, prepare, amx_linear, restore, amx_linear, rows=rows)
AVX512 = Backend(
    "cpu-avx512", TAKES, avx512_obstacle, prepare, avx512_linear, restore, avx512_linear, rows=rows
)
