"""Weights of compressed-tensors folders that llmq has no kernel for, as the numbers they stand for.

    FP8     weight F8_E4M3 [N, K]; weight_scale [1], [N, 1], or one per block of rows and columns
    MXFP8   the same with weight_scale uint8 [N, K / 32]: powers of two, by their exponent + 127
    MXFP4   weight_packed uint8 [N, K / 2]: E2M1, the even column in the low half; scales as MXFP8
    NVFP4   the same with weight_scale F8_E4M3 [N, K / 16] and weight_global_scale float32 [1]

A global scale of NVFP4 is what scales were multiplied with when they were stored, so it divides
here (ModelOpt stores its inverse)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.compressed_settings import WeightArgs
from llmq.grid.small_floats import e2m1_values, e8m0_values

_REALS = (torch.float16, torch.bfloat16, torch.float32)


def decode(
    name: str, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]
) -> Tensor:
    """The weight float32 `[N, K]`. Raises `LlmqError` for anything damaged."""
    stored = "weight" if args.bits == 8 else "weight_packed"
    if missing := {stored, "weight_scale"} - tensors.keys():
        raise LlmqError(f"{name}: tensor {min(missing)} is missing; the checkpoint is damaged")
    values = _values(name, tensors[stored], args.bits, shape)
    scale = _scale(name, tensors, args, shape)
    return values.mul_(_expanded(name, scale, args, shape))


def _values(name: str, stored: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """What is multiplied with the scales, float32 `[N, K]`."""
    n, k = shape
    if bits == 8:
        _check(f"{name}.weight", stored, torch.float8_e4m3fn, (n, k))
        return stored.float()
    _check(f"{name}.weight_packed", stored, torch.uint8, (n, k // 2))
    return e2m1_values(stored)


def _scale(
    name: str, tensors: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]
) -> Tensor:
    """The scales float32, in the shape they are stored in."""
    scale = tensors["weight_scale"]
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return e8m0_values(scale)
    if args.bits == 4:
        _check(f"{name}.weight_scale", scale, torch.float8_e4m3fn, tuple(scale.shape))
        whole = tensors.get("weight_global_scale")
        if whole is None:
            raise LlmqError(
                f"{name}: tensor weight_global_scale is missing; the checkpoint is damaged"
            )
        _check(f"{name}.weight_global_scale", whole.view(-1), torch.float32, (1,))
        return scale.float() / whole.view(1)
    if scale.dtype not in _REALS:
        raise LlmqError(
            f"{name}.weight_scale: expected real numbers, got {scale.dtype}; the checkpoint is "
            "damaged"
        )
    return scale.float()


def _expanded(name: str, scale: Tensor, args: WeightArgs, shape: tuple[int, int]) -> Tensor:
    """The scales with a row and a column for each of the weight's, or for all."""
    n, k = shape
    if args.block is None and args.group_size == 0:
        _check(f"{name}.weight_scale", scale.reshape(-1), torch.float32, (1,))
        return scale.view(1, 1)
    rows, columns = args.block or (1, args.group_size if args.group_size > 0 else k)
    _check(f"{name}.weight_scale", scale, torch.float32, (-(-n // rows), -(-k // columns)))
    if args.block is None and columns == k:
        return scale
    by_rows = scale.repeat_interleave(rows, 0)[:n]
    return by_rows.repeat_interleave(columns, 1)[:, :k]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise `LlmqError` for a tensor of another dtype or shape, or with NaN or infinite values."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise LlmqError(
            f"{name}: expected {dtype} of shape {list(shape)}, got {tensor.dtype} of shape "
            f"{list(tensor.shape)}; the checkpoint is damaged"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise LlmqError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")
