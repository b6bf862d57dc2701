"""Matrices that are stored as small floats with scales, read as bfloat16.

    X.weight F8_E4M3 [N, K]       beside it X.weight_scale_inv, X.weight_scale, X.scale or
                                  X.qscale_weight, one for a block of rows and columns (DeepSeek,
                                  MiniMax: 128 x 128), for a row, or for all
    X.weight I8 [N, K / 2]        the same with E2M1, two to a byte (experts of DeepSeek-V4)
    X.down_proj F8_E4M3 [E, ..]   the same for all experts in one, with X.down_proj_scale_inv

A weight is its stored float times its scale, computed in float32 and rounded to bfloat16 once, as
transformers has it. Scales that inputs were quantized with (`activation_scale`, `input_scale`) are
no part of a weight: they are read by nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid.small_floats import e2m1_values, e8m0_values
from llmq.models.shards import ShardReader
from llmq.models.tensors import Slices, View

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_FP4_DTYPES = ("I8", "U8")
_EXPONENTS = ("U8", "F8_E8M0")  # scales that are powers of two
_SCALE_DTYPES = (*_EXPONENTS, "F32", "BF16", "F16")
_ROWS_AT_A_TIME = 1024
_INVERSE = "_scale_inv"
_OF_INPUTS = ("activation_scale", "input_scale", "qscale_act")


@dataclass(frozen=True)
class ScaledView(View):
    """stored: the floats, their scales, and what belongs to inputs. grid: shape of the scales, with
    as many dimensions as the weight. block: rows and columns that share one. kind: for reports."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    block: tuple[int, int]
    is_fp4: bool
    dtype: str = "BF16"

    @property
    def kind(self) -> str:
        """What reports call it."""
        rows, columns = self.block
        how = f"a scale per {rows} x {columns}"
        if columns == self.shape[-1]:
            how = {1: "a scale per row", self.shape[-2]: "one scale"}.get(rows, how)
        return f"{'FP4' if self.is_fp4 else 'FP8'} with {how}"

    def read(self, slices: Slices) -> Tensor:
        return self.part(slices, ...)

    def part(self, slices: Slices, index: Any) -> Tensor:
        is_matrix = len(self.shape) == 2
        if index is not ... and (is_matrix or not isinstance(index, int)):
            return self.read(slices)[index]
        scale = _numbers(slices(self.stored[1])[...]).reshape(self.grid)
        return self._decoded(slices(self.stored[0])[index], scale[index])

    def _decoded(self, stored: Tensor, scale: Tensor) -> Tensor:
        """bfloat16 of floats `[..., N, K]`, some rows at a time."""
        n, k = self.shape[-2:]
        rows, columns = self.block
        step = -(-_ROWS_AT_A_TIME // rows) * rows
        found = torch.empty(*stored.shape[:-1], k, dtype=torch.bfloat16)
        for start in range(0, n, step):
            part = stored[..., start : start + step, :]
            values = e2m1_values(part) if self.is_fp4 else part.float()
            its = scale[..., start // rows : -(-(start + step) // rows), :]
            its = its.repeat_interleave(rows, -2)[..., : values.shape[-2], :]
            found[..., start : start + step, :] = values.mul_(
                its.repeat_interleave(columns, -1)[..., :k]
            )
        return found


def _numbers(stored: Tensor) -> Tensor:
    """float32 of scales."""
    is_exponent = stored.dtype in (torch.uint8, torch.float8_e8m0fnu)
    return e8m0_values(stored) if is_exponent else stored.float()


def scaled_views(shards: ShardReader, block: tuple[int, int] | None) -> dict[str, ScaledView]:
    """The matrices of a folder that have scales, under their own names. block: rows and columns of
    one, where config.json says so. Raises `LlmqError` for scales without what they belong to, and
    those of another number than a weight has blocks."""
    views = {}
    for name, scale in _pairs(shards):
        is_fp4 = shards.dtypes[name] in _FP4_DTYPES
        stored_shape = shards.shapes[name]
        shape = (*stored_shape[:-1], 2 * stored_shape[-1]) if is_fp4 else stored_shape
        grid = _grid(shape, shards.shapes[scale], block)
        if grid is None or shards.dtypes[scale] not in _SCALE_DTYPES:
            blocks = "" if block is None else f", of which {block[0]} x {block[1]} share one,"
            raise LlmqError(
                f"{shards.names[scale]}: tensor {scale} has shape {list(shards.shapes[scale])} and "
                f"dtype {shards.dtypes[scale]}, expected scales of {name} of shape {list(shape)}"
                f"{blocks} as real numbers or exponents; config.json does not belong to these "
                "weights, or they are damaged"
            )
        stem = name.removesuffix(".weight")
        others = [f"{stem}.{suffix}" for suffix in _OF_INPUTS if f"{stem}.{suffix}" in shards.names]
        size = _block(shape, grid, block)
        views[name] = ScaledView((name, scale, *others), shape, grid, size, is_fp4)
    return views


def _pairs(shards: ShardReader) -> Iterator[tuple[str, str]]:
    """Names of weights and of their scales."""
    for name, dtype in shards.dtypes.items():
        if name.endswith((_INVERSE, ".weight_scale")):
            _check_belongs(shards, name)
        if len(shards.shapes[name]) < 2:
            continue
        scale = _scale_of(name, shards.dtypes)
        if scale is None:
            continue
        is_fp4 = dtype in _FP4_DTYPES and shards.dtypes[scale] in _EXPONENTS
        if dtype in FP8_DTYPES or is_fp4:
            yield name, scale


def _scale_of(name: str, stored: Mapping[str, str]) -> str | None:
    """What the scales of a weight are stored under."""
    candidates = [f"{name}{_INVERSE}", f"{name}_scale"]
    if name.endswith(".weight"):
        stem = name.removesuffix("weight")
        candidates += [f"{stem}scale", f"{stem}qscale_weight"]
    return next((each for each in candidates if each in stored), None)


def _check_belongs(shards: ShardReader, scale: str) -> None:
    """Raise `LlmqError` for scales of a weight that is not there, or has none by its dtype."""
    name = scale.removesuffix("_inv").removesuffix("_scale")
    if f"{name}_packed" in shards.names:
        return  # codes, which those who read their format know
    if name not in shards.names:
        raise LlmqError(
            f"{shards.names[scale]}: tensor {scale} holds scales, but the tensor {name} that they "
            "belong to is not stored; the checkpoint is incomplete: download it again"
        )
    if shards.dtypes[name] not in (*FP8_DTYPES, *_FP4_DTYPES):
        raise LlmqError(
            f"{shards.names[scale]}: tensor {scale} holds scales, but {name} is stored as "
            f"{shards.dtypes[name]}, expected {' or '.join(FP8_DTYPES)}; the checkpoint is mixed "
            "of two: download it again"
        )


def _grid(
    shape: tuple[int, ...], stored: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, ...] | None:
    """The shape of scales with as many dimensions as the weight, None for one that does not fit: a
    scale for all, for every matrix, for every row, or for every block."""
    *lead, n, k = shape
    for grid in ((*lead, 1, 1), (*lead, n, 1)):
        bare = tuple(grid[: len(stored)])
        if stored == grid or (stored == bare and all(each == 1 for each in grid[len(stored) :])):
            return grid
    if all(each == 1 for each in stored):
        return (1,) * len(shape) if not lead else None
    if len(stored) != len(shape) or stored[:-2] != tuple(lead):
        return None
    rows, columns = stored[-2:]
    if block is not None and (rows, columns) == (-(-n // block[0]), -(-k // block[1])):
        return stored
    return None if n % rows or k % columns else stored


def _block(
    shape: tuple[int, ...], grid: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns that share a scale: as it is stated, where that gives these scales, else as
    many as there must be."""
    (n, k), (rows, columns) = shape[-2:], grid[-2:]
    if stated is not None and (rows, columns) == (-(-n // stated[0]), -(-k // stated[1])):
        return stated
    return n // rows, k // columns
