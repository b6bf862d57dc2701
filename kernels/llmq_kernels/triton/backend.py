"""The GPU backends: `triton` (16-bit activations) and `triton-int8` (activations quantized to INT8,
per token or by a static range).

This is the host side: what is accepted, how a weight is laid out once, which kernel is launched
with which tiles. Triton is imported by the first launch. Under `TRITON_INTERPRET=1` the same code
runs on CPU tensors, which is how the kernels are checked on machines without a GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.capability import Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.packing import packed_width
from llmq_kernels.core.weight import PackedWeight
from llmq_kernels.triton import choices, layout, tuning
from llmq_kernels.triton.choices import Choice, Problem


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def installed() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    try:
        return find_spec("triton") is not None
    except ValueError:  # how find_spec reports a module that was set to None
        return False


@cache
def _modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    from llmq_kernels.triton import gemm, gemv, int8

    return gemv, gemm, int8


def _use_asm() -> bool:
    """Inline PTX: on NVIDIA chips only."""
    return not interpreting() and torch.version.hip is None


@cache
def _capability(device: torch.device) -> int:
    """The major compute capability of an NVIDIA chip, 0 elsewhere."""
    if not _use_asm() or device.type != "cuda":
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _early(choice: Choice, device: torch.device) -> bool:
    """Whether kernels are launched before those they wait for have ended: where the choice says so
    and chips can, from Hopper on."""
    return choice.early and _capability(device) >= 9


def _launched_early(choice: Choice, device: torch.device) -> dict[str, bool]:
    """The launch option of a kernel that waits in the device for the one before it."""
    return {"launch_pdl": True} if _early(choice, device) else {}


# --- what is accepted -----------------------------------------------------------------------------

_HALVES = (torch.float16, torch.bfloat16)
_FLOAT = Takes(
    devices=("cuda", "cpu"),  # the CPU in the interpreter only, see `_device_refusal`
    activations=("none",),
    dtypes=_HALVES,
    codes=(CODES["int8"], CODES["int4"], CODES["int3"], CODES["int2"], CODES["ternary"]),
    groups=layout.UNIT_COLUMNS,
    zero="code",  # masked to the width of a code on its way into the magic number
    act_order=True,
)
TAKES = (_FLOAT,)
_INT8 = replace(
    _FLOAT,
    activations=("int8-token", "int8-static"),
    codes=(CODES["int8"], CODES["int4"]),
)
INT8_TAKES = (_INT8, replace(_INT8, codes=(CODES["int2"], CODES["ternary"]), groups=64))


@cache
def _device_refusal(device: torch.device) -> str | None:
    if not installed():
        return "Triton is not installed (pip install '.[triton]' in a clone of llmq)"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return (
            f"it runs on GPUs, not on {device.type} (or on the CPU in Triton's interpreter, with "
            "TRITON_INTERPRET=1)"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        has = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 or newer, and {name} has {has}"
    return None


def _group(weight: PackedWeight) -> int:
    """Columns per scale as the kernels take it: 0 for one scale per row or tensor."""
    return 0 if weight.scale.shape[1] == 1 else weight.group_size


def obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels for 16-bit activations cannot take a weight here, or None."""
    return _device_refusal(device) or layout.act_order_refusal(weight)


def int8_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the integer kernels cannot take a weight here, or None."""
    # Codes lie at the top of their bytes, so every product is below 128 * 128, or 128 * 255 where a
    # zero point moves them to one side.
    k, most = weight.shape[1], (1 << 31) // (128 * (128 if weight.zero is None else 255))
    if _group(weight) == 0 and k >= most:
        return f"its sums of {most} and more columns would not fit 32 bits, and K is {k}"
    return obstacle(weight, dtype, device)


# --- preparation ----------------------------------------------------------------------------------


def _side_tensors(weight: PackedWeight) -> State:
    """Scales and zero points `[G, N]`, with zero rows for the groups of padding columns, and the
    column order of act-order weights."""
    n, k = weight.shape
    group = _group(weight)
    missing = 0 if group == 0 else -(-layout.padded_columns(k) // group) - weight.scale.shape[1]
    scale = torch.nn.functional.pad(layout.transposed(weight.scale, n), (0, 0, 0, missing))
    state = {"scale_t": scale}
    if weight.zero is not None:
        state["zero_t"] = torch.nn.functional.pad(
            layout.transposed(weight.zero, n), (0, 0, 0, missing)
        )
    if weight.g_idx is not None:
        state["order"] = layout.column_order(weight.g_idx)
    return state


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """Units of eight codes in place of the canonical words, and, where scales can be multiplied
    into the weight, these in float32, too: the pipeline of loads copies no less than four bytes."""
    state = {"packed": layout.pack_units(weight), **_side_tensors(weight)}
    if _group(weight):
        state["scale_fold"] = state["scale_t"].float()
    return state


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words."""
    return layout.unpack_units(weight, state["packed"])


def rows(weight: PackedWeight, state: State, index: Tensor) -> Tensor:
    """The canonical words of some rows."""
    return layout.unpack_units(weight, state["packed"][index])


def int8_rows(weight: PackedWeight, state: State, index: Tensor) -> Tensor:
    """The canonical words of some rows."""
    return layout.unpack_bytes(weight, state["packed"][index])


def int8_prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """Bytes of interleaved codes in place of the canonical words."""
    return {"packed": layout.pack_bytes(weight), **_side_tensors(weight), **weight.static_shift()}


def int8_restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words."""
    return layout.unpack_bytes(weight, state["packed"])


# --- products -------------------------------------------------------------------------------------


def problem_of(x: Tensor, weight: PackedWeight) -> Problem:
    """What `triton/tuning` chooses by."""
    kind = "float" if weight.activations == "none" else "int8"
    return Problem(
        kind,
        weight.code.bits,
        _group(weight),
        str(x.dtype).removeprefix("torch."),
        *weight.shape,
        choices.bucket(x.shape[0]),
    )


def linear(x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for x `[M, K]`, float16 or bfloat16."""
    return run(
        x, weight, state, bias, tuning.choose(problem_of(x, weight), choices.chip_of(x.device))
    )


def run(
    x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None, choice: Choice
) -> Tensor:
    """The product by a given choice; `linear` looks the choice up, the tuner tries them."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    x = x[:, state["order"]] if "order" in state else x.contiguous()
    with _current(x.device):
        if weight.activations != "none":
            return _int8_gemm(x, weight, state, bias, choice)
        if choice.method == "dequantize":
            return torch.nn.functional.linear(
                x, _dequantize(weight, state, x.dtype), None if bias is None else bias.to(x.dtype)
            )
        return (
            _gemv(x, weight, state, bias, choice)
            if choice.method == "gemv"
            else _gemm(x, weight, state, bias, choice)
        )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _meaning(weight: PackedWeight, state: State) -> dict[str, Any]:
    """The compile-time arguments that say what codes mean, for every kernel with 16-bit
    activations."""
    low, *high = layout.PLANES[weight.code.bits]
    planes = {"LOW_BITS": low, "HIGH_BITS": high[0] if high else 0}
    return {
        "GROUP": _group(weight),
        "OFFSET": int(weight.code.offset),
        "HAS_ZERO": "zero_t" in state,
        "USE_ASM": _use_asm(),
        **planes,
    }


def _high_words(weight: PackedWeight) -> int:
    """Where the second plane of a row begins. An argument of its own, so that the compiler sees its
    divisibility and reads 16 bytes at a time."""
    return packed_width(layout.padded_columns(weight.shape[1]), layout.PLANES[weight.code.bits][0])


def _folds(choice: Choice, weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether scales are multiplied into the weight: where the choice says so, there are groups,
    and the type of x holds the scales (bfloat16 holds all, in two parts)."""
    held = dtype == torch.bfloat16 or weight.scale.dtype == dtype
    return choice.fold and held and _group(weight) > 0


def _launch_options(choice: Choice) -> dict[str, Any]:
    # Fusing multiplications and additions is said explicitly: Triton's default changes with 3.10.
    return {"num_warps": choice.warps, "num_stages": choice.stages, "enable_fp_fusion": True}


def _gemv(
    x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None, choice: Choice
) -> Tensor:
    (m, k), n, packed = x.shape, weight.shape[0], state["packed"]
    out = x.new_empty(m, n)
    _modules()[0].gemv_kernel[(-(-n // choice.block_n),)](
        x,
        packed,
        state["scale_t"],
        state.get("zero_t", packed),
        out if bias is None else bias,
        out,
        m,
        n,
        k,
        layout.padded_columns(k),
        packed.shape[1],
        _high_words(weight),
        HAS_BIAS=bias is not None,
        BLOCK_M=min(choices.bucket(m), 4),
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        EVEN_K=k % choice.block_k == 0,
        **_meaning(weight, state),
        **_launch_options(choice),
    )
    return out


def _workspace(x: Tensor, n: int, choice: Choice) -> tuple[Tensor, Tensor]:
    """The output, and where the GEMM writes: the output itself, or one float32 slice per split."""
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    return out, out if choice.split_k == 1 else torch.empty(
        choice.split_k, *out.shape, dtype=torch.float32, device=x.device
    )


def _reduce(workspace: Tensor, out: Tensor, bias: Tensor | None, choice: Choice) -> Tensor:
    if choice.split_k > 1:
        _modules()[1].reduce_kernel[(-(-out.numel() // 1024),)](
            workspace,
            out if bias is None else bias,
            out,
            out.numel(),
            out.shape[1],
            HAS_BIAS=bias is not None,
            SPLIT_K=choice.split_k,
            EARLY=_early(choice, out.device),
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
            **_launched_early(choice, out.device),
        )
    return out


def _grid(m: int, n: int, choice: Choice) -> tuple[int, int, int]:
    """Tiles of M, tiles of N, splits of K."""
    return -(-m // choice.block_m), -(-n // choice.block_n), choice.split_k


def _split_tiles(k: int, choice: Choice) -> int:
    """Tiles of K of one split."""
    return -(-layout.padded_columns(k) // choice.block_k // choice.split_k)


def _gemm(
    x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None, choice: Choice
) -> Tensor:
    (m, k), n, packed = x.shape, weight.shape[0], state["packed"]
    out, target = _workspace(x, n, choice)
    fold = _folds(choice, weight, x.dtype)
    _modules()[1].gemm_kernel[_grid(m, n, choice)](
        x,
        packed,
        state["scale_fold" if fold else "scale_t"],
        state.get("zero_t", packed),
        out if bias is None else bias,
        target,
        m,
        n,
        k,
        layout.padded_columns(k),
        packed.shape[1],
        _high_words(weight),
        _split_tiles(k, choice),
        HAS_BIAS=bias is not None,
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        IS_SPLIT=choice.split_k > 1,
        FOLD=fold,
        EVEN_K=k == layout.padded_columns(k),
        EARLY=_early(choice, x.device),
        SETTLE=_capability(x.device) == 9,
        UPCAST=interpreting(),
        **_meaning(weight, state),
        **_launch_options(choice),
    )
    return _reduce(target, out, bias, choice)


def quantize_tokens(
    x: Tensor,
    sum_columns: int,
    input_range: Tensor | None = None,
    *,
    has_sums: bool = True,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[M, K]` as int8 codes `[M, padded K]`, float32 scales `[M]`, and int32 sums of the codes
    over every `sum_columns` columns, `[M, padded K / sum_columns]` (uninitialized without
    has_sums).

    input_range: float32 `[2]`, one scale and zero point for all tokens (codes are then 128 lower
    than stored ones), or None for a scale per token. early: the next kernel may be launched while
    this one runs."""
    m, k = x.shape
    padded = layout.padded_columns(k)
    codes = torch.empty(m, padded, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    sums = torch.empty(m, padded // sum_columns, dtype=torch.int32, device=x.device)
    whole = 1 << (padded - 1).bit_length()
    at_once = input_range is None and whole <= 16384
    block = whole if at_once else min(whole, 4096)
    options = {
        "HAS_SUMS": has_sums,
        "SUM_COLUMNS": sum_columns,
        "BLOCK_K": block,
        "EARLY": early,
        "num_warps": 16 if block > 4096 else 8 if block > 1024 else 4,
        "enable_fp_fusion": True,
    }
    if input_range is None:
        _modules()[2].quantize_tokens_kernel[(m,)](
            x, codes, scale, sums, k, padded, AT_ONCE=at_once, **options
        )
    else:
        _modules()[2].quantize_static_kernel[(m,)](
            x, input_range, codes, scale, sums, k, padded, **options
        )
    return codes, scale, sums


def _int8_gemm(
    x: Tensor, weight: PackedWeight, state: State, bias: Tensor | None, choice: Choice
) -> Tensor:
    (m, k), n, packed = x.shape, weight.shape[0], state["packed"]
    early = _early(choice, x.device)
    codes, scale, sums = quantize_tokens(
        x, choice.block_k, weight.input_range, has_sums="zero_t" in state, early=early
    )
    if "shift" in state:
        bias = state["shift"] if bias is None else state["shift"] + bias
    out, target = _workspace(x, n, choice)
    _modules()[2].int8_gemm_kernel[_grid(m, n, choice)](
        codes,
        scale,
        sums,
        packed,
        state["scale_t"],
        state.get("zero_t", packed),
        out if bias is None else bias,
        target,
        m,
        n,
        layout.padded_columns(k),
        packed.shape[1],
        _split_tiles(k, choice),
        GROUP=_group(weight),
        OFFSET=int(weight.code.offset),
        HAS_ZERO="zero_t" in state,
        HAS_BIAS=bias is not None,
        BITS=weight.code.bits,
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        IS_SPLIT=choice.split_k > 1,
        USE_ASM=_use_asm(),
        EARLY=early,
        **_launch_options(choice),
        **_launched_early(choice, x.device),
    )
    return _reduce(target, out, bias, choice)


def _dequantize(weight: PackedWeight, state: State, dtype: torch.dtype) -> Tensor:
    """`[N, K]` in the kernels' column order."""
    (n, k), packed = weight.shape, state["packed"]
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    block_n, block_k = 64, choices.tile_columns(_group(weight))
    grid = (-(-n // block_n), layout.padded_columns(k) // block_k)
    _modules()[1].dequantize_kernel[grid](
        packed,
        state["scale_t"],
        state.get("zero_t", packed),
        out,
        n,
        k,
        layout.padded_columns(k),
        packed.shape[1],
        _high_words(weight),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **_meaning(weight, state),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def dequantize(weight: PackedWeight, state: State, dtype: torch.dtype) -> Tensor:
    """`[N, K]` in dtype, columns in their own order; for gradients with respect to x."""
    with _current(state["packed"].device):
        values = _dequantize(weight, state, dtype)
    if "order" in state:
        values = values[:, torch.argsort(state["order"])]
    return values


BACKEND = Backend("triton", TAKES, obstacle, prepare, linear, restore, linear, dequantize, rows)
INT8_BACKEND = Backend(
    "triton-int8",
    INT8_TAKES,
    int8_obstacle,
    int8_prepare,
    linear,
    int8_restore,
    linear,
    rows=int8_rows,
)
