"""Backends whose kernels llmq compiles itself: `cpu-amx` and `cpu-avx512` (bfloat16 activations,
exact) and `cpu-vnni` (INT8 activations). All read the one layout of `layout`.

What is exact stays exact: `cpu-amx` and `cpu-avx512` take weights whose activations are "none" and
round nothing but the dequantized weight and the result to bfloat16. `cpu-vnni` takes "int8-token"
and "int8-static", which the checkpoint asks for, and "int8-group", which whoever runs the model
asks for: one scale per token and 32, 64 or 128 columns, much closer to the truth than one per
token, and up to twice the speed of int4pack for one token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq_kernels.compiled import jit
from llmq_kernels.compiled.layout import BAND, Layout, arrange, arrange_scale, restore_codes
from llmq_kernels.core import capability
from llmq_kernels.core.capability import FLOATS, Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.errors import KernelDied
from llmq_kernels.core.packing import pack, unpack
from llmq_kernels.core.reference import activation_group, quantize_static
from llmq_kernels.core.weight import PackedWeight
from llmq_kernels.torch_cpu import operators

State = dict[str, Tensor]
# up to here rows of W are shared out in small portions, above in portions whose codes stay in the
# second-level cache while all tokens pass
FEW_TOKENS = 32
AMX_TOKENS = 6  # from here on INT8 activations go to the tile unit; measured at 4096 x 4096
AMX_TOKENS_WHOLE = 3  # the same where rows and tokens have one scale each
AVX512_TOKENS = 11  # the same for tiles on the vector unit, measured on a Zen 4
AVX512_TOKENS_WHOLE = 96
WHOLE_COLUMNS = operators.EXACT_COLUMNS  # one integer sum over all of K
TILE_KERNELS = {"amx": ("amx", "amx_int8"), "avx512": ("avx512vnni", "avx512_int8")}
AVX512_FEW = (
    8  # tokens that are multiplied one by one without a tile unit; as many as the kernel takes
)
INT8_FORMS = ("avx512vnni", "avxvnni", "avx2")


# --- what the kernels take --------------------------------------------------------------------------------------------------

_NARROW = (CODES["int4"], CODES["int3"], CODES["int2"], CODES["ternary"])
_BF16 = Takes(
    devices=("cpu",),
    activations=("none",),
    dtypes=(torch.bfloat16,),
    codes=_NARROW,
    groups=32,
    zero="byte",
)
# Codes of 8 bits become bfloat16 integers, and rows are scaled at the end.
BF16_TAKES = (_BF16, replace(_BF16, codes=(CODES["int8"],), groups=0, zero="none"))
INT8_TAKES = (
    Takes(
        devices=("cpu",),
        activations=("int8-token", "int8-static", "int8-group"),
        dtypes=FLOATS,
        codes=(*_NARROW, CODES["int8"]),
        groups=32,
        zero="byte",
    ),
)


def amx_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the tile unit cannot take a weight here, or None."""
    return jit.obstacle("amx", "this CPU or system has no AMX tiles for bfloat16")


def avx512_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the vector unit cannot take a weight here, or None."""
    return jit.obstacle("avx512bf16", "this CPU has no AVX512 instructions for bfloat16")


def int8_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the integer kernels cannot take a weight here, or None."""
    if reason := int8_machine_refusal():
        return reason
    if weight.activations == "int8-group" or jit.supports("avx512vnni"):
        return None
    instead = capability.refusal(
        operators.W8A8_TAKES, weight, dtype, device
    ) or operators.w8a8_obstacle(weight, dtype, device)
    if instead is None:
        return "without AVX512-VNNI, oneDNN (cpu-w8a8) is faster with 8-bit weights and more than a few tokens"
    return None


def int8_machine_refusal() -> str | None:
    """Why no integer kernel runs on this machine, or None."""
    return jit.missing() or (None if int8_form() else "this CPU has no AVX2")


def int8_form() -> str | None:
    """The widest form of the integer kernels that this CPU runs."""
    return next((form for form in INT8_FORMS if jit.supports(form)), None)


# --- the layout, once per weight ------------------------------------------------------------------------------------------


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """Codes in bands, in place of the canonical words, and float32 scales in bands; with zero
    points also `-scale * zero`."""
    n, k = weight.shape
    layout = Layout(weight.code.bits, n, k)
    n_groups = -(-layout.k_padded // _columns_per_group(weight))

    def in_bands(values: Tensor) -> Tensor:
        return arrange_scale(
            torch.nn.functional.pad(values, (0, n_groups - values.shape[1])), n, layout.n_bands
        )

    state = {
        "packed": arrange(unpack(weight.packed, weight.code.bits, k), weight.code.bits),
        "band_scale": in_bands(weight.scale.float()),
    }
    if weight.zero is not None:
        state["band_shift"] = in_bands(-weight.scale.float() * weight.zero.float())
    return state | weight.static_shift()


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words."""
    return pack(restore_codes(state["packed"], weight.code.bits, *weight.shape), weight.code.bits)


def _columns_per_group(weight: PackedWeight) -> int:
    """Columns per scale; one group spans the padding too."""
    return (
        Layout(weight.code.bits, *weight.shape).k_padded
        if weight.scale.shape[1] == 1
        else weight.group_size
    )


def _base_group(weight: PackedWeight) -> int:
    """The largest of 128, 64, 32 that divides the group."""
    return (
        128
        if weight.scale.shape[1] == 1
        else next(size for size in (128, 64, 32) if weight.group_size % size == 0)
    )


def _weight_pointers(state: State) -> tuple[int, int, int]:
    shift = state.get("band_shift")
    return (
        state["packed"].data_ptr(),
        state["band_scale"].data_ptr(),
        0 if shift is None else shift.data_ptr(),
    )


def _padded(x: Tensor, k_padded: int) -> Tensor:
    return (
        x if x.shape[1] == k_padded else torch.nn.functional.pad(x, (0, k_padded - x.shape[1]))
    ).contiguous()


# --- bfloat16 activations -----------------------------------------------------------------------------------------------------


def amx_linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` for bfloat16 x `[M, K]`."""
    return _tiled_bf16(x, weight, state, "amx", "amx")


def avx512_linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` for bfloat16 x `[M, K]`."""
    (n, k), m = weight.shape, x.shape[0]
    if m > AVX512_FEW:
        return _tiled_bf16(x, weight, state, "avx512bf16", "avx512")
    layout = Layout(weight.code.bits, n, k)
    x = _padded(x, layout.k_padded)
    ordered, out = torch.empty_like(x), x.new_empty(m, n)
    jit.kernel("avx512bf16", "avx512", "order_kernel")(
        x.data_ptr(), ordered.data_ptr(), m, layout.k_padded // 64, threads=1
    )
    kernel = jit.kernel("avx512bf16", "avx512", "few_kernel", *_bf16_parameters(weight))
    kernel(
        *_weight_pointers(state),
        ordered.data_ptr(),
        out.data_ptr(),
        n,
        m,
        layout.n_bands,
        _bands_per_item(layout.n_bands, m),
        layout.n_blocks,
        state["band_scale"].shape[1],
        _columns_per_group(weight),
    )
    return out


def _tiled_bf16(x: Tensor, weight: PackedWeight, state: State, form: str, module: str) -> Tensor:
    """By token tiles."""
    (n, k), m = weight.shape, x.shape[0]
    layout = Layout(weight.code.bits, n, k)
    x = _padded(x, layout.k_padded)
    out = x.new_empty(m, n)
    tiles = torch.empty(-(-m // 16) * 16 * layout.k_padded, dtype=torch.bfloat16)
    jit.kernel("avx512vnni", "token_tiles", "bf16_pack_kernel")(
        x.data_ptr(), tiles.data_ptr(), m, layout.k_padded // 64, layout.k_padded * 2
    )
    kernel = jit.kernel(form, module, "gemm_kernel", *_bf16_parameters(weight))
    sizes = (
        layout.n_bands,
        _bands_per_item(layout.n_bands, m),
        layout.n_blocks,
        state["band_scale"].shape[1],
        _columns_per_group(weight),
    )
    kernel(*_weight_pointers(state), tiles.data_ptr(), out.data_ptr(), n, m, *sizes)
    return out


def _bf16_parameters(weight: PackedWeight) -> tuple[int, int, bool, int]:
    return weight.code.bits, _base_group(weight), weight.zero is not None, int(weight.code.offset)


def _bands_per_item(n_bands: int, m: int) -> int:
    """How many bands of rows a thread takes at a time: an even number, and several portions for
    each thread."""
    portions = n_bands // (4 * torch.get_num_threads()) // 2 * 2
    return max(2, min(4 if m <= FEW_TOKENS else BAND, portions))


# --- INT8 activations ---------------------------------------------------------------------------------------------------------


def int8_linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` for x `[M, K]`, quantized on the way; sums are exact within groups and float32
    between them."""
    form = int8_form()
    if form is None:
        raise KernelDied(f"no form of the integer kernels runs here: {int8_machine_refusal()}")
    if "shift" in state:
        return int8_product(x, weight, state, form).add_(state["shift"]).to(x.dtype)
    return int8_product(x, weight, state, form, dtype=x.dtype)


def int8_product(
    x: Tensor,
    weight: PackedWeight,
    state: State,
    form: str,
    unit: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`[M, N]` by the kernels of one form. unit: "rows" for those that take rows and tokens one by
    one, "avx512" or "amx" for those that take tiles of 16; by default what is fastest here."""
    (n, k), m = weight.shape, x.shape[0]
    layout = Layout(weight.code.bits, n, k)
    group = activation_group(
        weight.code.bits, weight.group_size if weight.scale.shape[1] > 1 else k
    )
    unit = unit or _int8_unit(m, group, _is_whole(weight))
    x_group = layout.k_padded if _is_whole(weight) else group
    if weight.input_range is not None:
        x_codes, x_scale, x_sum = quantize_by_range(x, layout.k_padded, x_group, weight.input_range)
    else:
        x_codes, x_scale, x_sum = quantize(
            _padded(x, layout.k_padded),
            x_group,
            group if weight.activations == "int8-group" else layout.k_padded,
            form,
        )
    group = 0 if _is_whole(weight) else group
    if unit != "rows":
        return _tile_product(
            x_codes, x_scale, x_sum, weight, state, layout, group, *TILE_KERNELS[unit]
        ).to(dtype)
    is_bf16 = dtype == torch.bfloat16
    out = torch.empty(m, n, dtype=dtype if is_bf16 else torch.float32)
    kernel = jit.kernel(
        form,
        "vnni",
        "gemm_kernel",
        form,
        weight.code.bits,
        group,
        weight.zero is not None,
        int(weight.code.offset),
        is_bf16,
    )
    activations = (x_codes.data_ptr(), x_scale.data_ptr(), x_sum.data_ptr())
    kernel(
        *_weight_pointers(state),
        *activations,
        out.data_ptr(),
        n,
        m,
        layout.n_bands,
        _bands_per_item(layout.n_bands, m),
        layout.n_blocks,
        state["band_scale"].shape[1],
        _columns_per_group(weight),
    )
    return out.to(dtype)


def _int8_unit(m: int, group: int, is_whole: bool) -> str:
    """What multiplies m tokens fastest on this CPU. Groups of 32 do not fill tiles."""
    if group >= 64 and jit.supports("amx"):
        return "amx" if m >= (AMX_TOKENS_WHOLE if is_whole else AMX_TOKENS) else "rows"
    if group >= 64 and jit.supports("avx512vnni"):
        return "avx512" if m >= (AVX512_TOKENS_WHOLE if is_whole else AVX512_TOKENS) else "rows"
    return "rows"


def _is_whole(weight: PackedWeight) -> bool:
    """One scale on both sides: all of K is one group, whose integer sum has to fit 32 bits."""
    return (
        weight.activations != "int8-group"
        and weight.scale.shape[1] == 1
        and weight.shape[1] <= WHOLE_COLUMNS
    )


def _tile_product(
    x_codes: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    weight: PackedWeight,
    state: State,
    layout: Layout,
    group: int,
    form: str,
    module: str,
) -> Tensor:
    m, k = x_codes.shape
    scale, start, total = (
        _by_token_tile(values)
        for values in (x_scale, (x_sum * -weight.code.offset).int(), x_scale * x_sum)
    )
    tiles, out = (
        torch.empty(-(-m // 16) * 16, k, dtype=torch.int8),
        torch.empty(m, weight.shape[0], dtype=torch.float32),
    )
    jit.kernel("avx512vnni", "token_tiles", "int8_pack_kernel")(
        x_codes.data_ptr(), tiles.data_ptr(), m, k // 64
    )
    kernel = jit.kernel(
        form, module, "gemm_kernel", weight.code.bits, group, weight.zero is not None
    )
    activations = (tiles.data_ptr(), scale.data_ptr(), start.data_ptr(), total.data_ptr())
    sizes = (
        layout.n_bands,
        _bands_per_item(layout.n_bands, m),
        layout.n_blocks,
        state["band_scale"].shape[1],
        _columns_per_group(weight),
    )
    kernel(*_weight_pointers(state), *activations, out.data_ptr(), weight.shape[0], m, *sizes)
    return out


def _by_token_tile(values: Tensor) -> Tensor:
    """`[M, G]` as `[token tiles, G, 16]`."""
    m, n_groups = values.shape
    return (
        torch.nn.functional.pad(values, (0, 0, 0, -m % 16))
        .view(-1, 16, n_groups)
        .transpose(1, 2)
        .contiguous()
    )


def quantize(x: Tensor, group: int, span: int, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of x `[M, K]`, and per group of columns a scale and the sum of the codes, `[M, K /
    group]`. span: columns that share a scale, a multiple of the group."""
    m, k = x.shape
    x = x if x.dtype == torch.bfloat16 else x.float()
    codes, scale, total = (
        torch.empty(m, k, dtype=torch.int8),
        torch.empty(m, k // group, dtype=torch.float32),
        torch.empty(m, k // group, dtype=torch.float32),
    )
    kernel = jit.kernel(form, "vnni", "quantize_kernel", x.dtype == torch.bfloat16)
    kernel(
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        total.data_ptr(),
        m,
        k,
        span,
        group,
        threads=1 if m == 1 else None,
    )
    return codes, scale, total


def quantize_by_range(
    x: Tensor, k_padded: int, group: int, input_range: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one scale and zero point for all tokens: codes are 128 lower than
    `reference.quantize_static` stores them, and zero in the columns from K to k_padded."""
    m, k = x.shape
    codes = torch.zeros(m, k_padded, dtype=torch.int8)
    codes[:, :k] = (quantize_static(x, input_range) ^ 128).view(torch.int8)
    total = codes.view(m, -1, group).sum(2, dtype=torch.int32).float()
    return codes, torch.full_like(total, float(input_range[0])), total
