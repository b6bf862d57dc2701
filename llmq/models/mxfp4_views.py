"""Experts of gpt-oss: MXFP4, all of a layer in one.

    X.gate_up_proj_blocks  U8 [E, N, K / 32, 16]   E2M1, two to a byte
    X.gate_up_proj_scales  U8 [E, N, K / 32]       powers of two

What transformers has in their place is X.gate_up_proj `[E, K, N]`, transposed. bfloat16 holds all
of its values exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid.small_floats import e2m1_values, e8m0_values
from llmq.models.shards import ShardReader
from llmq.models.tensors import Slices, View

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block
_COLUMNS = 2 * _BYTES


@dataclass(frozen=True)
class Mxfp4View(View):
    """stored: blocks and scales. shape: `[E, K, N]`."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def kind(self) -> str:
        return "MXFP4"

    def read(self, slices: Slices) -> Tensor:
        return torch.stack([self.part(slices, index) for index in range(self.shape[0])])

    def part(self, slices: Slices, index: Any) -> Tensor:
        """`[K, N]` of one expert, which is all that is read for it."""
        if not isinstance(index, int):
            return self.read(slices)[index]
        blocks, scales = slices(self.stored[0])[index], slices(self.stored[1])[index]
        values = e2m1_values(blocks).mul_(e8m0_values(scales)[..., None])
        return values.flatten(-2).to(torch.bfloat16).T


def mxfp4_views(shards: ShardReader) -> dict[str, Mxfp4View]:
    """The weights whose blocks a folder stores, by the names that they have in full precision.
    Raises `LlmqError` for blocks without scales, scales without blocks, and those that do not
    belong to each other."""
    views = {}
    for stored, dtype in shards.dtypes.items():
        if dtype != "U8" or not stored.endswith((_BLOCKS, _SCALES)):
            continue
        name = stored.removesuffix(_BLOCKS).removesuffix(_SCALES)
        blocks, scales = name + _BLOCKS, name + _SCALES
        missing = next((each for each in (blocks, scales) if each not in shards.names), None)
        if missing is not None:
            raise LlmqError(
                f"{shards.names[stored]}: tensor {stored} is stored without {missing}, which it "
                "takes to read MXFP4; the checkpoint is incomplete: download it again"
            )
        shape = shards.shapes[blocks]
        if len(shape) != 4 or shape[-1] != _BYTES or shards.shapes[scales] != shape[:-1]:
            raise LlmqError(
                f"{shards.names[scales]}: tensors {blocks} of shape {list(shape)} and {scales} of "
                f"shape {list(shards.shapes[scales])}, expected [E, N, K / {_COLUMNS}, {_BYTES}] "
                "and the same without the last; the checkpoint is damaged"
            )
        n_experts, n, n_blocks, _ = shape
        views[name] = Mxfp4View((blocks, scales), (n_experts, n_blocks * _COLUMNS, n))
    return views
