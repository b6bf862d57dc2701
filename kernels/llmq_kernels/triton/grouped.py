"""The host side of `triton/experts`: which weights go together, where they lie, and which rows go
to which. What a weight may be is what the backend `triton` declares, since each is prepared by it.
All in a launch are alike, and none has groups in another order (act-order), for which x would have
to be gathered for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq_kernels.triton import backend, choices, layout
from llmq_kernels.triton.choices import Choice

if TYPE_CHECKING:
    from llmq_kernels.core.dispatch import PreparedWeight

_OF_EACH = ("packed", "scale_t", "zero_t")


@cache
def _kernels() -> ModuleType:
    from llmq_kernels.triton import experts

    return experts


def refusal(weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None]) -> str | None:
    """Why weights cannot be multiplied in one launch, or None."""
    first = weights[0]
    if any(one.backend is not backend.BACKEND for one in weights):
        return f"experts in one launch are for the backend triton, not {first.backend.name}"
    if any("order" in one.state for one in weights):
        return "experts in one launch have no act-order groups"
    if len(set(map(_kind, weights))) > 1:
        return "experts in one launch are packed alike, and these are not"
    dtypes = {None if bias is None else bias.dtype for bias in biases}
    return "some experts have biases of other dtypes, or none" if len(dtypes) > 1 else None


def _kind(weight: PreparedWeight) -> tuple[object, ...]:
    """What is the same for all weights of a launch."""
    return weight.dtype, weight.device, weight.layout, weight.weight.scale.dtype


@dataclass(frozen=True, eq=False)
class Tiles:
    """Rows sorted by expert, in tiles of block_m. source: int64 `[M]`, the row of x that each is.
    table: int32 `[tiles, 3]`, see `experts_kernel`."""

    source: Tensor
    table: Tensor
    block_m: int

    def of_sorted(self) -> Tiles:
        """The same for an x whose rows are sorted already."""
        order = torch.arange(len(self.source), device=self.source.device)
        return Tiles(order, self.table, self.block_m)


def tiles_of(experts: Tensor, source: Tensor, n_experts: int) -> Tiles:
    """experts: int64 `[M]`, ascending; n_experts and more stand for none. source: int64 `[M]`. No
    number leaves the device."""
    m, device = len(experts), experts.device
    block_m = min(max(choices.bucket(-(-m // n_experts)), 16), 64)
    ends = torch.searchsorted(experts, torch.arange(n_experts, device=device), right=True)
    firsts = torch.cat((ends.new_zeros(1), ends[:-1]))
    n_tiles = (ends - firsts + block_m - 1) // block_m
    tile_ends = n_tiles.cumsum(0)
    # Every expert with rows may fill one tile in part.
    tile = torch.arange(m // block_m + min(m, n_experts), device=device)
    expert = torch.searchsorted(tile_ends, tile, right=True)
    known = expert.clamp(max=n_experts - 1)
    first = firsts[known] + (tile - tile_ends[known] + n_tiles[known]) * block_m
    table = torch.stack((expert, first, ends[known]), dim=1).to(torch.int32)
    return Tiles(source, table, block_m)


class GroupedWeight:
    """Weights of one shape, packed alike, with their biases `[N]` or None."""

    def __init__(self, weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None]) -> None:
        self.weights, self.biases = tuple(weights), tuple(biases)
        first, bias = weights[0], biases[0]
        self.kind = (*_kind(first), first.weight.shape, None if bias is None else bias.dtype)
        parts = [[one.state.get(name) for one in weights] for name in _OF_EACH]
        rows = [_distances(part) for part in [*parts, list(biases)]]
        self.distances = torch.tensor(rows, dtype=torch.int64, device=first.device)

    def linear(self, x: Tensor, tiles: Tiles) -> Tensor:
        """The product of each sorted row with its expert's weight, `[M, N]`; rows of no expert are
        not written. x: `[T, K]`, float16 or bfloat16."""
        out, launch = self._launch(x, tiles)
        with backend._current(x.device):
            kernel = _kernels().experts_kernel[launch.grid]
            kernel(x.contiguous(), *self._tensors(out), out, self.distances, **launch.arguments)
        return out

    def gated(self, gate: GroupedWeight, x: Tensor, tiles: Tiles, activation: str) -> Tensor:
        """`activation(gate(x)) * self(x)` in one launch, `[M, N]`, rounded once. gate: packed as
        this one is (`goes_with`). activation: "silu", or "gelu" in its form with tanh."""
        out, launch = self._launch(x, tiles)
        with backend._current(x.device):
            _kernels().gated_kernel[launch.grid](
                x.contiguous(),
                *(*gate._tensors(out), gate.distances, *self._tensors(out), self.distances),
                out,
                IS_GELU=activation == "gelu",
                **launch.arguments,
            )
        return out

    def goes_with(self, gate: GroupedWeight) -> bool:
        """Whether both can be multiplied in one launch."""
        return self.kind == gate.kind

    def _tensors(self, unused: Tensor) -> tuple[Tensor, ...]:
        """Words, scales, zero points and biases of the first expert. unused: stands for those that
        there are not."""
        state, bias = self.weights[0].state, self.biases[0]
        zero = state.get("zero_t", state["packed"])
        return state["packed"], state["scale_t"], zero, unused if bias is None else bias

    def _launch(self, x: Tensor, tiles: Tiles) -> tuple[Tensor, _Launch]:
        """An empty output, and what both kernels are started with."""
        first = self.weights[0]
        weight, state = first.weight, first.state
        n, k = weight.shape
        choice = choice_of(backend._group(weight), tiles.block_m)
        padded = layout.padded_columns(k)
        arguments = {
            "source": tiles.source,
            "tiles": tiles.table,
            "n_experts": len(self.weights),
            "N": n,
            "K": k,
            "K_padded": padded,
            "row_words": state["packed"].shape[1],
            "high_words": backend._high_words(weight),
            "HAS_BIAS": self.biases[0] is not None,
            "BLOCK_M": choice.block_m,
            "BLOCK_N": choice.block_n,
            "BLOCK_K": choice.block_k,
            "EVEN_K": k == padded,
            "SETTLE": backend._capability(x.device) == 9,
            "UPCAST": backend.interpreting(),
            **backend._meaning(weight, state),
            **backend._launch_options(choice),
        }
        grid = (len(tiles.table), -(-n // choice.block_n))
        return x.new_empty(len(tiles.source), n), _Launch(grid, arguments)


@dataclass(frozen=True)
class _Launch:
    """grid: of programs. arguments: by name, compile-time ones, too."""

    grid: tuple[int, int]
    arguments: dict[str, Any]


def choice_of(group: int, block_m: int) -> Choice:
    """Tiles that fit every chip, with as many warps as keep sums in registers. Not tuned."""
    warps = 8 if block_m == 64 else 4
    return Choice("gemm", block_m, 64, choices.tile_columns(group), warps=warps, stages=2)


def _distances(tensors: Sequence[Tensor | None]) -> list[int]:
    """Elements from the first to each; zeros where there are none."""
    found = [tensor for tensor in tensors if tensor is not None]
    if not found:
        return [0] * len(tensors)
    start, size = found[0].data_ptr(), found[0].element_size()
    return [(tensor.data_ptr() - start) // size for tensor in found]
