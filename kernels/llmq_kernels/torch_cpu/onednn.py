"""The backend `cpu-w8a8`: INT8 weights and INT8 activations, per token or by a static range, by
oneDNN's u8 x s8 GEMM, whose sums are exact in int32."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.capability import FLOATS, Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.packing import pack
from llmq_kernels.core.reference import EXACT_COLUMNS, quantize_static, quantize_tokens
from llmq_kernels.core.weight import PackedWeight
from llmq_kernels.torch_cpu.int8pack import signed_codes

TAKES = (
    Takes(
        devices=("cpu",),
        activations=("int8-token", "int8-static"),
        dtypes=FLOATS,
        codes=(CODES["int8"],),
        groups=0,
        zero="none",
    ),
)


def obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN's integer GEMM cannot take a weight here, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no VNNI, without which u8 x s8 products saturate"
    if weight.shape[1] > EXACT_COLUMNS:
        return (
            f"its sums of more than {EXACT_COLUMNS} columns would not fit 32 bits, "
            f"and K is {weight.shape[1]}"
        )
    return None


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """oneDNN's own layout in place of the canonical words. The operator packs a non-contiguous
    weight wrongly without saying so."""
    packed = torch.ops.onednn.qlinear_prepack(signed_codes(weight).contiguous(), None)
    return {
        "packed": packed,
        "row_scale": weight.scale[:, 0].expand(weight.shape[0]).float().contiguous(),
    }


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words."""
    return pack(state["packed"].to_dense().T.contiguous().view(torch.uint8) ^ 128, 8)


def linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` with x quantized per token or by its static range; the sums are exact, scales are
    applied in float32."""
    codes, scale, zero = _quantize_input(x, weight)
    out = torch.ops.onednn.qlinear_pointwise(
        codes,
        1.0,
        zero,
        state["packed"],
        state["row_scale"],
        None,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return out.mul_(scale).to(x.dtype)


def _quantize_input(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor, int]:
    """u8 codes `[M, K]`, float32 scale (per token `[M, 1]`, or one), zero point."""
    if weight.input_range is None:
        return *quantize_tokens(x), 128
    return quantize_static(x, weight.input_range), weight.input_range[0], int(weight.input_range[1])


BACKEND = Backend("cpu-w8a8", TAKES, obstacle, prepare, linear, restore)
