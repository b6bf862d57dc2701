"""The backend `cpu-kleidiai`: 4-bit and narrower weights with INT8 activations on ARM64, by torch's
`_dyn_quant_matmul_4bit`, behind which Arm's KleidiAI stands.

What it computes: each token is rounded to INT8 by its own scale and zero point, from its smallest
and largest value ("int8-token-asym", `reference.quantize_token_ranges`); sums are exact within a
group, float32 between groups. So it is W4A8 and never taken for exact arithmetic: whoever runs the
model asks for it, or the checkpoint does with "int8-token", whose steps of a 127th of the largest
magnitude are never finer than these. Scales of groups are bfloat16, 0.14% off on average; a scale
per row is float32.

Codes go in as bytes of two, the even column in the low half, 8 being zero. Where they come to lie
is KleidiAI's own business and differs by machine; products with unit vectors give them back."""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor

from llmq_kernels.core.backend import Backend, State
from llmq_kernels.core.capability import Takes
from llmq_kernels.core.codes import CODES
from llmq_kernels.core.packing import pack, unpack
from llmq_kernels.core.reference import expand_groups
from llmq_kernels.core.weight import PackedWeight

TAKES = (
    Takes(
        devices=("cpu",),
        activations=("int8-token", "int8-token-asym"),
        dtypes=(torch.float32, torch.bfloat16),
        codes=(CODES["int4"], CODES["int3"], CODES["int2"], CODES["ternary"]),
        groups=32,
        zero="none",
    ),
)
ZERO = 8  # the code that the operator subtracts
UNIT_VECTORS = 256  # multiplied at a time, to get codes back


# --- where it runs --------------------------------------------------------------------------------


@cache
def machine_obstacle() -> str | None:
    """Why KleidiAI does not run here, or None. Elsewhere the operators have a reference body, which
    is right and far too slow."""
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return f"KleidiAI's kernels are for ARM64, not {platform.machine()}"
    if not hasattr(torch.ops.aten, "_dyn_quant_matmul_4bit"):
        return "this torch has no _dyn_quant_matmul_4bit"
    packed = _packed(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1))
    if packed.dtype != torch.uint8:  # the reference body keeps numbers
        return "this torch is built without KleidiAI, or this CPU has no dot-product instructions"
    return None


def obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why KleidiAI cannot take a weight here, or None."""
    if reason := machine_obstacle():
        return reason
    k = weight.shape[1]
    if k % 2:
        return f"it needs an even number of columns, not {k}"
    if weight.scale.shape[1] > 1 and k % weight.group_size:
        return f"it needs groups that divide K, not {k} columns in groups of {weight.group_size}"
    if bool((weight.scale == 0).any()):
        return "codes under a scale of zero could not be given back"
    return None


# --- the backend ----------------------------------------------------------------------------------


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """KleidiAI's own layout of codes and scales, in place of the canonical words."""
    n, k = weight.shape
    codes = unpack(weight.packed, weight.code.bits, k) + (ZERO - int(weight.code.offset))
    return {"packed": _packed(codes, weight.scale.expand(n, -1))}


def _packed(codes: Tensor, scale: Tensor) -> Tensor:
    """codes: uint8 `[N, K]` around 8. scale: `[N, G]`."""
    (n, k), n_groups = codes.shape, scale.shape[1]
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
    stored = scale.to(torch.float32 if n_groups == 1 else torch.bfloat16).contiguous()
    return torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, stored, None, k // n_groups, k, n)


def restore(weight: PackedWeight, state: State) -> Tensor:
    """The canonical words. A unit vector is rounded to itself, and its product is a column of
    `scale * (code - 8)`."""
    n, k = weight.shape
    scale = expand_groups(weight.scale.float().expand(n, -1), k, weight.group_size)
    codes = torch.empty(n, k, dtype=torch.uint8)
    for start in range(0, k, UNIT_VECTORS):
        columns = slice(start, min(start + UNIT_VECTORS, k))
        unit = torch.eye(k)[columns]
        steps = linear(unit, weight, state).T / (scale[:, columns] if scale.shape[1] > 1 else scale)
        codes[:, columns] = (steps.round() + weight.code.offset).to(torch.uint8)
    return pack(codes, weight.code.bits)


def linear(x: Tensor, weight: PackedWeight, state: State) -> Tensor:
    """`x @ W.T` for x `[M, K]`. The operator takes bfloat16 with one scale per row only, so x is
    always handed over as float32."""
    n, k = weight.shape
    columns = k // weight.scale.shape[1]
    values = x.float().contiguous()
    out = torch.ops.aten._dyn_quant_matmul_4bit(values, state["packed"], columns, k, n)
    return out.to(x.dtype)


BACKEND = Backend("cpu-kleidiai", TAKES, obstacle, prepare, linear, restore)
