"""Other INT4 kernels for the same shapes, group 128, where they are installed: torch's own
`_weight_int4pack_mm`, GemLite, torchao and vLLM's Marlin.

Each entry makes a function `x -> y` from random codes `[N, K]`, scales `[N, K / 128]` and zero
point 8. One that is not installed, or refuses, is reported with its reason instead of a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq.benchmark import timing

GROUP = 128
Function = Callable[[Tensor], Tensor]


def torch_int4pack(codes: Tensor, scale: Tensor) -> Function:
    """torch's tinygemm kernel, which is part of torch."""
    scale_and_zero = (
        torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()
    )
    if codes.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed, GROUP, scale_and_zero
        )
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scale_and_zero)


def gemlite(codes: Tensor, scale: Tensor) -> Function:
    """GemLite's Triton kernels."""
    from gemlite.core import DType, GemLiteLinear

    n, k = codes.shape
    layer = GemLiteLinear(
        4,
        group_size=GROUP,
        in_features=k,
        out_features=n,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    return lambda x: layer(x)


def torchao(codes: Tensor, scale: Tensor) -> Function:
    """torchao's default INT4 weight-only layer."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    weight = (codes.to(torch.bfloat16) - 8) * scale.repeat_interleave(GROUP, dim=1)
    layer = torch.nn.Linear(
        codes.shape[1], codes.shape[0], bias=False, dtype=torch.bfloat16, device=codes.device
    )
    layer.weight.data.copy_(weight)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
    return lambda x: layer(x)


def marlin(codes: Tensor, scale: Tensor) -> Function:
    """vLLM's Marlin, through vLLM's own helper that quantizes a weight for it."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_empty_g_idx,
        marlin_make_workspace_new,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    n, k = codes.shape
    weight = ((codes.to(torch.bfloat16) - 8) * scale.repeat_interleave(GROUP, dim=1)).T.contiguous()
    _, packed, marlin_scale, g_idx, order, _ = marlin_quantize(
        weight, scalar_types.uint4b8, GROUP, act_order=False
    )
    workspace, empty = (
        marlin_make_workspace_new(codes.device),
        marlin_make_empty_g_idx(codes.device),
    )
    return lambda x: apply_gptq_marlin_linear(
        x,
        packed,
        marlin_scale,
        empty,
        g_idx,
        order,
        workspace,
        scalar_types.uint4b8,
        n,
        k,
        is_k_full=True,
    )


RIVALS: dict[str, Callable[[Tensor, Tensor], Function]] = {
    "torch int4pack": torch_int4pack,
    "GemLite": gemlite,
    "torchao": torchao,
    "vLLM Marlin": marlin,
}


def seconds(
    n: int, k: int, inputs: Mapping[int, Tensor], device: torch.device, repeats: int
) -> dict[int, dict[str, Any]]:
    """By M and name: {"seconds": ..., "relative_error": ...}, or {"missing": why}."""
    results: dict[int, dict[str, Any]] = {m: {} for m in inputs}
    count = timing.copies_for(n * k // 2, device)
    weights = [
        (
            torch.randint(0, 16, (n, k), device=device, dtype=torch.uint8),
            (torch.rand(n, k // GROUP, device=device) * 0.01 + 0.005).bfloat16(),
        )
        for _ in range(count)
    ]
    for name, make in RIVALS.items():
        try:
            functions = [make(codes, scale) for codes, scale in weights]
            for m, x in inputs.items():
                error = _relative_error(functions[0](x), x, *weights[0])
                elapsed = timing.seconds(
                    [partial(function, x) for function in functions], device, repeats
                )
                results[m][name] = {"seconds": elapsed, "relative_error": error}
        except (
            Exception
        ) as error:  # other projects' code: whatever it raises is the reason why there is no figure
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            for result in results.values():
                result.setdefault(name, {"missing": reason})
    return results


def _relative_error(out: Tensor, x: Tensor, codes: Tensor, scale: Tensor) -> float:
    expected = x.float() @ ((codes.float() - 8) * scale.float().repeat_interleave(GROUP, dim=1)).T
    return float((out.float() - expected).norm() / expected.norm())
