"""The backend `cpu-vnni`: products with activations quantized to INT8.

It takes "int8-token" and "int8-static", which the checkpoint asks for, and "int8-group", which
whoever runs the model asks for: one scale per token and 32, 64 or 128 columns, much closer to the
truth than one per token.

Two kinds of kernels multiply: those that take rows and tokens one by one (`vnni`), and those that
take tiles of 16 tokens (`amx_int8`, `avx512_int8`), from a number of tokens on that is measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq_kernels.compiled import jit
from llmq_kernels.compiled.decoding import add_bias
from llmq_kernels.compiled.prepared import (
    layout_of,
    padded,
    prepare,
    restore,
    rows,
    weight_pointers,
    weight_sizes,
)
from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.capability import FLOATS, Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.errors import KernelDied
from llmq_kernels.core.reference import EXACT_COLUMNS, activation_group, quantize_static
from llmq_kernels.core.weight import PackedWeight
from llmq_kernels.torch_cpu import onednn

TAKES = (
    Takes(
        devices=("cpu",),
        activations=("int8-token", "int8-static", "int8-group"),
        dtypes=FLOATS,
        codes=(CODES["int4"], CODES["int3"], CODES["int2"], CODES["ternary"], CODES["int8"]),
        groups=32,
        zero="byte",
    ),
)
FORMS = ("avx512vnni", "avxvnni", "avx2")
TILE_KERNELS = {"amx": ("amx", "amx_int8"), "avx512": ("avx512vnni", "avx512_int8")}
# From how many tokens on they go to the tile unit, measured at 4096 x 4096; and the same where rows
# and tokens have one scale each.
AMX_TOKENS = 6
AMX_TOKENS_WHOLE = 3
# The same for tiles on the vector unit, measured on a Zen 4.
AVX512_TOKENS = 11
AVX512_TOKENS_WHOLE = 96


# --- where it runs --------------------------------------------------------------------------------


def obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the integer kernels cannot take a weight here, or None."""
    if reason := machine_refusal():
        return reason
    if weight.activations == "int8-group" or jit.supports("avx512vnni"):
        return None
    if onednn.BACKEND.refusal(weight, dtype, device) is None:
        return (
            "without AVX512-VNNI, oneDNN (cpu-w8a8) is faster with 8-bit weights and more than a "
            "few tokens"
        )
    return None


def machine_refusal() -> str | None:
    """Why no integer kernel runs on this machine, or None."""
    return jit.missing() or (None if widest_form() else "this CPU has no AVX2")


def widest_form() -> str | None:
    """The widest form of the integer kernels that this CPU runs."""
    return next((form for form in FORMS if jit.supports(form)), None)


# --- the product ----------------------------------------------------------------------------------


def linear(x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x `[M, K]`, quantized on the way; sums are exact within groups and
    float32 between them."""
    form = widest_form()
    if form is None:
        raise KernelDied(f"no form of the integer kernels runs here: {machine_refusal()}")
    if "shift" in state:
        out = product(x, weight, state, form).add_(state["shift"]).to(x.dtype)
    else:
        out = product(x, weight, state, form, dtype=x.dtype)
    if bias is not None:
        add_bias(out, bias.to(out.dtype))
    return out


def product(
    x: Tensor,
    weight: PackedWeight,
    state: State,
    form: str,
    *,
    unit: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`[M, N]` by the kernels of one form. unit: "rows" for those that take rows and tokens one by
    one, "avx512" or "amx" for those that take tiles of 16; by default what is fastest here."""
    group = _activation_group(weight)
    unit = unit or _unit(weight, x.shape[0])
    tokens = _quantized(x, weight, form)
    if unit != "rows":
        return _by_tiles(tokens, weight, state, unit).to(dtype)
    m, n = x.shape[0], weight.shape[0]
    is_bf16 = dtype == torch.bfloat16
    out = torch.empty(m, n, dtype=dtype if is_bf16 else torch.float32)
    columns = 0 if _is_whole(weight) else group
    meaning = (weight.code.bits, columns, weight.zero is not None, int(weight.code.offset))
    kernel = jit.kernel(form, "vnni", "gemm_kernel", form, *meaning, is_bf16)
    pointers = [tensor.data_ptr() for tensor in (*tokens, out)]
    kernel(*weight_pointers(state), *pointers, n, m, *weight_sizes(weight, state, m))
    return out.to(dtype)


def _activation_group(weight: PackedWeight) -> int:
    columns = weight.group_size if weight.scale.shape[1] > 1 else weight.shape[1]
    return activation_group(weight.code.bits, columns)


def _unit(weight: PackedWeight, m: int) -> str:
    """What multiplies m tokens fastest on this CPU. Groups of 32 do not fill tiles."""
    if _activation_group(weight) < 64:
        return "rows"
    whole = _is_whole(weight)
    if jit.supports("amx"):
        return "amx" if m >= (AMX_TOKENS_WHOLE if whole else AMX_TOKENS) else "rows"
    if jit.supports("avx512vnni"):
        return "avx512" if m >= (AVX512_TOKENS_WHOLE if whole else AVX512_TOKENS) else "rows"
    return "rows"


def _is_whole(weight: PackedWeight) -> bool:
    """One scale on both sides: all of K is one group, whose integer sum has to fit 32 bits."""
    return (
        weight.activations != "int8-group"
        and weight.scale.shape[1] == 1
        and weight.shape[1] <= EXACT_COLUMNS
    )


def _by_tiles(tokens: Tokens, weight: PackedWeight, state: State, unit: str) -> Tensor:
    """float32 `[M, N]` by token tiles."""
    (m, k), n = tokens.codes.shape, weight.shape[0]
    group = 0 if _is_whole(weight) else _activation_group(weight)
    tiles = torch.empty(-(-m // 16) * 16, k, dtype=torch.int8)
    out = torch.empty(m, n, dtype=torch.float32)
    scale = _by_token_tile(tokens.scale)
    start = _by_token_tile((tokens.total * -weight.code.offset).int())
    total = _by_token_tile(tokens.scale * tokens.total)
    pack = jit.kernel("avx512vnni", "token_tiles", "int8_pack_kernel")
    pack(tokens.codes.data_ptr(), tiles.data_ptr(), m, k // 64)
    form, module = TILE_KERNELS[unit]
    meaning = (weight.code.bits, group, weight.zero is not None)
    kernel = jit.kernel(form, module, "gemm_kernel", *meaning)
    pointers = [tensor.data_ptr() for tensor in (tiles, scale, start, total, out)]
    kernel(*weight_pointers(state), *pointers, n, m, *weight_sizes(weight, state, m))
    return out


def _by_token_tile(values: Tensor) -> Tensor:
    """`[M, G]` as `[token tiles, G, 16]`."""
    m, n_groups = values.shape
    filled = torch.nn.functional.pad(values, (0, 0, 0, -m % 16))
    return filled.view(-1, 16, n_groups).transpose(1, 2).contiguous()


# --- the activations ------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """codes: int8 `[M, padded K]`. scale, total: float32 `[M, padded K / group]`, of each group its
    scale and the sum of its codes."""

    codes: Tensor
    scale: Tensor
    total: Tensor


def _quantized(x: Tensor, weight: PackedWeight, form: str) -> Tokens:
    """x as the kernels read it."""
    group, k_padded = _activation_group(weight), layout_of(weight).k_padded
    columns = k_padded if _is_whole(weight) else group
    if weight.input_range is not None:
        return quantize_by_range(x, k_padded, columns, weight.input_range)
    span = group if weight.activations == "int8-group" else k_padded
    return quantize(padded(x, k_padded), columns, span, form)


def quantize(x: Tensor, group: int, span: int, form: str) -> Tokens:
    """x `[M, K]` with scales for every `span` columns, a multiple of the group."""
    m, k = x.shape
    x = x if x.dtype == torch.bfloat16 else x.float()
    codes = torch.empty(m, k, dtype=torch.int8)
    scale = torch.empty(m, k // group, dtype=torch.float32)
    total = torch.empty(m, k // group, dtype=torch.float32)
    kernel = jit.kernel(form, "quantize", "quantize_kernel", x.dtype == torch.bfloat16)
    pointers = [tensor.data_ptr() for tensor in (x, codes, scale, total)]
    kernel(*pointers, m, k, span, group, threads=1 if m == 1 else None)
    return Tokens(codes, scale, total)


def quantize_by_range(x: Tensor, k_padded: int, group: int, input_range: Tensor) -> Tokens:
    """The same with one scale and zero point for all tokens: codes are 128 lower than
    `reference.quantize_static` stores them, and zero in the columns from K to k_padded."""
    m, k = x.shape
    codes = torch.zeros(m, k_padded, dtype=torch.int8)
    codes[:, :k] = (quantize_static(x, input_range) ^ 128).view(torch.int8)
    total = codes.view(m, -1, group).sum(2, dtype=torch.int32).float()
    return Tokens(codes, torch.full_like(total, float(input_range[0])), total)


BACKEND = Backend("cpu-vnni", TAKES, obstacle, prepare, linear, restore, linear, rows=rows)
