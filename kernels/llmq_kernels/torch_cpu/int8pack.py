"""The backend `cpu-int8`: INT8 weights with bfloat16 activations, by torch's int8pack operator for
few rows of x. For more rows, codes become bfloat16 (exact up to 256) and outputs are multiplied by
their scale, since scales are per row."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels.core.backend import Backend, State, no_obstacle
from llmq_kernels.core.capability import Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.packing import pack, unpack
from llmq_kernels.core.weight import PackedWeight

TAKES = (
    Takes(
        devices=("cpu",),
        activations=("none",),
        dtypes=(torch.bfloat16,),  # others work, but are not fast
        codes=(CODES["int8"],),
        groups=0,
        zero="none",
    ),
)
MAX_ROWS = 12  # of x, up to which the operator is faster, measured at 4096 x 4096
BLOCK_ROWS = 1024  # of W, expanded at a time


def signed_codes(weight: PackedWeight) -> Tensor:
    """int8 `[N, K]`, q - 128."""
    return (unpack(weight.packed, 8, weight.shape[1]) ^ 128).view(torch.int8)


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """int8 codes in place of the canonical words, and scales `[N]`."""
    scale = weight.scale[:, 0].expand(weight.shape[0])
    return {
        "packed": signed_codes(weight),
        "row_scale": scale.to(dtype).contiguous(),
        "row_scale_float": scale.float().contiguous(),
    }


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words."""
    return pack(state["packed"].view(torch.uint8) ^ 128, 8)


def rows(weight: PackedWeight, state: State, index: Tensor) -> Tensor:
    """The canonical words of some rows."""
    return pack(state["packed"][index].view(torch.uint8) ^ 128, 8)


def linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` for bfloat16 x `[M, K]`."""
    codes = state["packed"]
    # The operator reads past the end of shapes that are not multiples of its registers: 77 x 300
    # ends the process.
    if x.shape[0] <= MAX_ROWS and codes.shape[0] % 16 == 0 and codes.shape[1] % 32 == 0:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, state["row_scale"])
    blocks = [torch.nn.functional.linear(x, block.to(x.dtype)) for block in codes.split(BLOCK_ROWS)]
    return (torch.cat(blocks, dim=1).float() * state["row_scale_float"]).to(x.dtype)


BACKEND = Backend("cpu-int8", TAKES, no_obstacle, prepare, linear, restore, rows=rows)
