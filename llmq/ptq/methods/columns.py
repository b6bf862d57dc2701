"""The column loop of GPTQ: for one layer, and for several of one shape side by side.

On layers of a few hundred rows the calls cost more than the arithmetic, and a mixture of experts
has a hundred such layers per block. Side by side they are solved with the calls of one. Every
number is computed as it would be alone, by the same operations in the same order: products run
layer by layer, on memory laid out as for one, and what is joined is element by element. The one
exception is where a row ends: torch rounds a multiplication and an addition once in whole vector
registers and twice in what is left over, differently in different calls. So rows must fill them,
which is what `LANES` is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from llmq.grid import rounding
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor

Order = Literal["group", "static", "none", "act"]
BLOCK_COLUMNS = 128
LANES = 32  # numbers that torch's loops over a row take at a time, at most


class ColumnLoop:
    """The column loop and its state: W^T in rounding order, codes, and the scales chosen so far."""

    def __init__(
        self,
        weight: Tensor,
        order: Tensor,
        importance: Tensor | None,
        spec: QuantSpec,
        kind: Order,
    ) -> None:
        n, k = weight.shape
        self.spec, self.order, self.importance = spec, order, importance
        self.group_size = spec.columns_per_group(k)
        self.static = kind == "static" and spec.group_size > 0
        self.keeps_g_idx = kind == "act" and spec.n_groups(k) > 1
        columns = torch.arange(k, device=weight.device)
        # The stored group of the column at each position: along the sorted columns under act-order,
        # where the column stands otherwise.
        self.group_of = (columns if self.keeps_g_idx else order) // self.group_size
        self.weight_t = weight.T[order].contiguous()  # [K, N]
        self.codes_t = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
        n_groups = spec.n_groups(k)
        self.scale_t = torch.empty(n_groups, n, dtype=torch.float32, device=weight.device)
        self.zero_t = torch.full_like(self.scale_t, spec.levels.offset)
        self.low_t, self.high_t = -self.zero_t, spec.levels.max - self.zero_t
        if self.static:
            self.take_scales(slice(None), *rounding.choose_scale(weight, spec, importance))

    def take_scales(self, groups: slice | int, scale: Tensor, zero: Tensor | None) -> None:
        """What was chosen for all groups, or for one: as `rounding.choose_scale` gives it."""
        self.scale_t[groups] = scale.T if isinstance(groups, slice) else scale[:, 0]
        if zero is not None:
            self.zero_t[groups] = zero.T if isinstance(groups, slice) else zero[:, 0]
            self.low_t[groups], self.high_t[groups] = (
                -self.zero_t[groups],
                self.spec.levels.max - self.zero_t[groups],
            )

    def importance_of(self, start: int, stop: int) -> Tensor:
        """Of the columns at some positions."""
        assert self.importance is not None
        return self.importance[self.order[start:stop]]

    def _enter_group(self, start: int, stop: int) -> None:
        """Choose the scales of the group at positions start..stop from the weights as they are
        now."""
        importance = None if self.importance is None else self.importance_of(start, stop)
        weight = self.weight_t[start:stop].T.contiguous()
        found = rounding.choose_scale(weight, one_group(self.spec), importance)
        self.take_scales(int(self.group_of[start]), *found)

    def groups(self) -> dict[int, int]:
        """Start -> stop of the groups along the way whose scales are chosen when they are
        reached."""
        if self.static:
            return {}
        boundaries = torch.nonzero(self.group_of.diff()).flatten().add_(1).tolist()
        return dict(zip([0, *boundaries], [*boundaries, len(self.order)], strict=True))

    def run(self, factor: Tensor) -> None:
        """Round all columns. factor: U of the reordered Hessian."""
        group_stops = self.groups()
        for start, stop in blocks(len(self.order), list(group_stops) or [0]):
            rows = rows_over_diagonal(factor, start, stop)
            errors = self._round_block(start, stop, rows[:, : stop - start], group_stops)
            self.weight_t[stop:].addmm_(rows[:, stop - start :].T, errors, alpha=-1)

    def _round_block(
        self, start: int, stop: int, factor: Tensor, group_stops: dict[int, int]
    ) -> Tensor:
        """Round the columns start..stop, spreading errors inside the block. factor: rows of U over
        their diagonal. Returns the errors `w - q` `[stop - start, N]`.

        On layers of a few hundred rows the calls cost more than the arithmetic, so there are five
        per column, and everything is taken apart once."""
        block = self.weight_t[start:stop]
        errors, integers = torch.empty_like(block), torch.empty_like(block)
        groups = self.group_of[start:stop]
        columns = zip(
            block.unbind(), integers.unbind(), errors.unbind(), groups.tolist(), strict=True
        )
        scales, lows, highs = (
            self.scale_t.unbind(),
            self.low_t.unbind(),
            self.high_t.unbind(),
        )  # views: they change as groups are entered
        for i, (column, rounded, error, group) in enumerate(columns):
            if start + i in group_stops:
                self._enter_group(start + i, group_stops[start + i])
            rounding.round_steps(
                torch.div(column, scales[group], out=rounded), lows[group], highs[group]
            )
            torch.addcmul(column, rounded, scales[group], value=-1, out=error)
            block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        self.take_integers(start, stop, integers)
        return errors

    def take_integers(self, start: int, stop: int, integers: Tensor) -> None:
        """Codes less their zero points, of the columns at positions start..stop."""
        self.codes_t[start:stop] = integers.add_(self.zero_t[self.group_of[start:stop]])

    def result(self) -> QuantizedTensor:
        codes_t = torch.empty_like(self.codes_t)
        codes_t[self.order] = self.codes_t
        g_idx = None
        if self.keeps_g_idx:
            g_idx = torch.empty(len(self.order), dtype=torch.int32, device=codes_t.device)
            g_idx[self.order] = self.group_of.to(torch.int32)
        scale, zero = self.scale_t.T, None if self.spec.symmetric else self.zero_t.T
        if self.spec.group_size == 0:
            scale, zero = scale[:1], None if zero is None else zero[:1]
        return QuantizedTensor.from_codes(codes_t.T, scale, zero, self.spec, g_idx)


def one_group(spec: QuantSpec) -> QuantSpec:
    """The spec for the columns of one group alone."""
    return replace(spec, group_size=PER_TENSOR if spec.group_size == PER_TENSOR else PER_ROW)


def rows_over_diagonal(factor: Tensor, start: int, stop: int) -> Tensor:
    """Rows start..stop of U from their diagonal on, over it."""
    return factor[start:stop, start:] / factor.diagonal()[start:stop, None]


def blocks(k: int, group_starts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of blocks of at most 128 columns. A group longer than a block starts one,
    since its scales need every earlier repair; shorter groups see the repairs of their own
    block."""
    longest = max(
        (b - a for a, b in zip(group_starts, [*group_starts[1:], k], strict=True)), default=k
    )
    if longest < BLOCK_COLUMNS:
        starts = group_starts[:: max(1, BLOCK_COLUMNS // longest)]
    else:
        starts = [
            start
            for a, b in zip(group_starts, [*group_starts[1:], k], strict=True)
            for start in range(a, b, BLOCK_COLUMNS)
        ]
    return list(zip(starts, [*starts[1:], k], strict=True))


def joined(owners: Sequence[object], name: str) -> Tensor:
    """A tensor that each of several objects has, as one `[E, ...]`, of which each then has its
    part."""
    whole = torch.stack([getattr(owner, name) for owner in owners])
    for owner, part in zip(owners, whole, strict=True):
        setattr(owner, name, part)
    return whole


class LoopsTogether:
    """Column loops over layers of one shape and spec, whose scales are chosen at the same
    positions. Not for one scale per tensor, which ties the rows of a layer together."""

    def __init__(self, loops: Sequence[ColumnLoop]) -> None:
        self.loops = loops
        self.static = loops[0].static
        self.weight_t = joined(loops, "weight_t")  # [E, K, N]
        self.grid = [joined(loops, name) for name in ("scale_t", "low_t", "high_t")]  # [E, G, N]
        self.group_of = torch.stack([loop.group_of for loop in loops])  # [E, K]
        self.each = torch.arange(len(loops), device=self.weight_t.device)
        # Of the columns at hand: scale, lowest and highest integer, `[E, N]`.
        self.current: list[Tensor] = []

    def run(self, factors: Sequence[Tensor]) -> None:
        """As `ColumnLoop.run`, given U of each."""
        group_stops = self.loops[0].groups()
        for start, stop in blocks(self.weight_t.shape[1], list(group_stops) or [0]):
            rows = [rows_over_diagonal(factor, start, stop) for factor in factors]
            inside = torch.stack([part[:, : stop - start] for part in rows])
            errors = self._round_block(start, stop, inside, group_stops)
            for loop, part, error in zip(self.loops, rows, errors, strict=True):
                loop.weight_t[stop:].addmm_(part[:, stop - start :].T, error, alpha=-1)

    def _round_block(
        self, start: int, stop: int, factor: Tensor, group_stops: dict[int, int]
    ) -> Tensor:
        """Errors `w - q` `[E, stop - start, N]`. factor: rows of U over their diagonal, `[E, stop -
        start, stop - start]`."""
        block = self.weight_t[:, start:stop]
        errors, integers = torch.empty_like(block), torch.empty_like(block)
        columns = zip(block.unbind(1), integers.unbind(1), errors.unbind(1), strict=True)
        for i, (column, rounded, error) in enumerate(columns):
            if start + i in group_stops:
                self._enter_group(start + i, group_stops[start + i])
            elif self.static:
                self._find_grid(start + i)
            scale, low, high = self.current
            rounding.round_steps(torch.div(column, scale, out=rounded), low, high)
            torch.addcmul(column, rounded, scale, value=-1, out=error)
            block[:, i + 1 :].addcmul_(factor[:, i, i + 1 :, None], error[:, None], value=-1)
        for loop, found in zip(self.loops, integers, strict=True):
            loop.take_integers(start, stop, found)
        return errors

    def _find_grid(self, position: int) -> None:
        groups = self.group_of[:, position]
        self.current = [values[self.each, groups] for values in self.grid]

    def _enter_group(self, start: int, stop: int) -> None:
        first = self.loops[0]
        rows = self.weight_t[:, start:stop].transpose(1, 2)  # [E, N, columns]
        importance = None
        if first.importance is not None:
            own = torch.stack([loop.importance_of(start, stop) for loop in self.loops])
            importance = own[:, None].expand_as(rows).flatten(0, 1)
        found = rounding.choose_scale(
            rows.flatten(0, 1).contiguous(), one_group(first.spec), importance
        )
        n = rows.shape[1]
        for i, loop in enumerate(self.loops):
            scale, zero = (None if part is None else part[i * n : (i + 1) * n] for part in found)
            assert scale is not None
            loop.take_scales(int(loop.group_of[start]), scale, zero)
        self._find_grid(start)
