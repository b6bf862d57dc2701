"""A weight in the layout of `layout`, and the arguments that say so to a kernel. All backends of
this folder share it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels.compiled.layout import (
    BAND,
    Layout,
    arrange,
    arrange_scale,
    restore_codes,
    rows_of,
)
from llmq_kernels.core.backend import State
from llmq_kernels.core.packing import pack, unpack
from llmq_kernels.core.weight import PackedWeight

# Up to here rows of W are shared out in small portions, above in portions whose codes stay in the
# second-level cache while all tokens pass.
FEW_TOKENS = 32


def prepare(weight: PackedWeight, dtype: torch.dtype) -> State:
    """Codes in bands, in place of the canonical words, and float32 scales in bands; with zero
    points also `-scale * zero`."""
    n, k = weight.shape
    layout = Layout(weight.code.bits, n, k)
    n_groups = -(-layout.k_padded // columns_per_group(weight))

    def in_bands(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, n_groups - values.shape[1]))
        return arrange_scale(padded, n, layout.n_bands)

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


def rows(weight: PackedWeight, state: State, index: Tensor) -> Tensor:
    """The canonical words of some rows."""
    bits, k = weight.code.bits, weight.shape[1]
    return pack(rows_of(state["packed"], bits, k, index), bits)


def layout_of(weight: PackedWeight) -> Layout:
    """Where its codes lie."""
    return Layout(weight.code.bits, *weight.shape)


def columns_per_group(weight: PackedWeight) -> int:
    """Columns per scale; one group spans the padding too."""
    return layout_of(weight).k_padded if weight.scale.shape[1] == 1 else weight.group_size


def base_group(weight: PackedWeight) -> int:
    """The largest of 128, 64, 32 that divides the group."""
    if weight.scale.shape[1] == 1:
        return 128
    return next(size for size in (128, 64, 32) if weight.group_size % size == 0)


def weight_pointers(state: State) -> tuple[int, int, int]:
    """Addresses of codes, scales and shifts; 0 where there is no shift."""
    shift = state.get("band_shift")
    return (
        state["packed"].data_ptr(),
        state["band_scale"].data_ptr(),
        0 if shift is None else shift.data_ptr(),
    )


def weight_sizes(weight: PackedWeight, state: State, m: int) -> tuple[int, int, int, int, int]:
    """Bands of rows, bands that a thread takes at a time, blocks of columns, groups and columns per
    group, for a product with m tokens."""
    layout = layout_of(weight)
    return (
        layout.n_bands,
        _bands_per_item(layout.n_bands, m),
        layout.n_blocks,
        state["band_scale"].shape[1],
        columns_per_group(weight),
    )


def _bands_per_item(n_bands: int, m: int) -> int:
    """An even number, and several portions for each thread."""
    portions = n_bands // (4 * torch.get_num_threads()) // 2 * 2
    return max(2, min(4 if m <= FEW_TOKENS else BAND, portions))


def padded(x: Tensor, k_padded: int) -> Tensor:
    """x `[M, K]` with zeros up to k_padded columns, contiguous."""
    missing = k_padded - x.shape[1]
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).contiguous()
