"""GPTQ: round column by column and let the columns that follow make up for each error (Frantar et
al., 2022).

With H = 2 X X^T and the upper factor U of its inverse (H^-1 = U^T U), rounding column i of W by `e
= (w - q) / U_ii` is best answered by `W[:, i:] -= e U[i, i:]`. U comes from one Cholesky
factorization of the matrix read backwards, J H J = L L^T, so U = J L^-1 J.

Columns with a large diag(H) come first, since they then have the most others left to repair their
errors:
    "group"   columns sorted inside each group, groups by their largest diag(H); a group's scale is
              chosen when it is reached, from weights that already carry the repairs;
    "static"  columns sorted over all groups; scales are chosen beforehand;
    "none"    as they stand;
    "act"     groups are formed along the sorted columns, and `g_idx` is stored.

The work runs on W^T, so that a column is a contiguous row. Nothing here knows of models: weight,
statistics and spec in, codes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid import rounding
from llmq.grid.spec import PER_ROW, PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor, stack_rows
from llmq.ptq.methods.base import Needs, Rounding, Shape, check_no_init
from llmq.ptq.methods.refine import refine
from llmq.ptq.solver import RowErrors, SolverResult, row_blocks, stack_errors
from llmq.ptq.stats import LayerStats, row_errors
from llmq.ptq.threads import one_thread
from llmq.recipe import Recipe

Order = Literal["group", "static", "none", "act"]
BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class GPTQOptions:
    """order: see the module's text. damping: added to diag(H), as a share of its mean; times 10
    until the factorization succeeds, at most the whole mean. search: choose scales by
    diag(H)-weighted error instead of by range. sweeps: passes of coordinate descent over codes and
    scales afterwards (`llmq.ptq.methods.refine`). alpha: the share of the correction for what the
    layers before this one lost, where the statistics carry it (GPTAQ, Li et al., 2025; there folded
    into the column loop, here a change of the target beforehand, which is the same least squares
    problem and leaves loop and descent as they are)."""

    order: Order = "group"
    damping: float = 0.01
    search: bool = True
    sweeps: int = 2
    alpha: float = 0.0


def factor_of_reversed(reversed_hessian: Tensor) -> Tensor | None:
    """Upper U `[K, K]` with H^-1 = U^T U, or None when H is not positive definite in float32. H is
    given with rows and columns backwards. Few copies are alive at a time, so hand the matrix over
    without keeping it: at K = 28672 it takes 3.3 GB."""
    with one_thread():
        lower, info = torch.linalg.cholesky_ex(reversed_hessian)
    del reversed_hessian
    if int(info) != 0:
        return None
    # The identity turns into the inverse in place: transposed, it already has the column order that
    # LAPACK writes.
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT
    with one_thread():
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1) if bool(torch.isfinite(inverse.sum())) else None


def _damped_factor(
    hessian: Tensor, order: Tensor, dead: Tensor, damping: float
) -> tuple[Tensor | None, float]:
    """The factor of the reordered, damped Hessian, and the damping (share of the mean diagonal) at
    which it succeeded. Dead columns get the mean as their diagonal."""
    share = min(damping, 1.0)
    while (
        factor := factor_of_reversed(_damped_reversed(hessian, order, dead, share))
    ) is None and share < 1:
        share = min(10 * share, 1.0)
    return factor, share


def _damped_reversed(hessian: Tensor, order: Tensor, dead: Tensor, share: float) -> Tensor:
    """A damped copy of the Hessian in rounding order, read backwards."""
    backwards = order.flip(0)
    damped = hessian[backwards[:, None], backwards]
    damped.diagonal().add_(_ridge(hessian, dead, share)[backwards])
    return damped


def column_order(importance: Tensor, group_size: int, order: Order) -> Tensor:
    """The order, int64 `[K]`, in which columns are rounded."""
    k = len(importance)
    if order == "none":
        return torch.arange(k, device=importance.device)
    if order in ("static", "act"):
        return torch.argsort(importance, descending=True, stable=True)
    groups = list(torch.split(torch.arange(k, device=importance.device), group_size))
    groups.sort(key=lambda columns: float(importance[columns].max()), reverse=True)
    return torch.cat(
        [
            columns[torch.argsort(importance[columns], descending=True, stable=True)]
            for columns in groups
        ]
    )


def gptq(
    weight: Tensor, stats: LayerStats, spec: QuantSpec, options: GPTQOptions = GPTQOptions()
) -> SolverResult:
    """Quantize a float32 weight `[N, K]`. Falls back to plain rounding, and says so, when the
    Hessian stays singular with all its mean diagonal added."""
    if spec.levels.offset % 1:
        raise LlmqError(
            f"GPTQ has no column loop for {spec}, whose levels lie between whole numbers; use "
            "--method rtn, or w2g64-asym"
        )
    diagonal = stats.hessian.diagonal().clone()
    dead = diagonal == 0
    n_dead = int(dead.sum())
    if n_dead:
        weight = weight.masked_fill(dead, 0)
    order = column_order(diagonal, spec.columns_per_group(weight.shape[1]), options.order)
    factor, damping = _damped_factor(stats.hessian, order, dead, options.damping)
    importance = diagonal if options.search else None
    if factor is None:
        return SolverResult(
            QuantizedTensor.quantize(weight, spec, importance),
            damping,
            n_dead,
            "Hessian not positive definite",
        )

    errors: list[RowErrors] = []
    ridge = _ridge(stats.hessian, dead, damping)

    def solve_rows(rows: slice) -> QuantizedTensor:
        part = weight[rows]
        if stats.cross is not None and options.alpha:
            part = torch.add(
                part, _shift(stats.pull(part, rows), order, factor), alpha=options.alpha
            )
        solve = _Solve(part, order, importance, spec, options)
        solve.run(factor)
        tensor = solve.result()
        del solve
        with _damped(stats.hessian, ridge):
            if options.sweeps:
                tensor = refine(part, tensor, stats.hessian, options.sweeps)
        rounded = QuantizedTensor.quantize(weight[rows], spec).dequantize().sub_(part)
        errors.append(
            RowErrors(
                row_errors(tensor.dequantize().sub_(part), stats.hessian),
                row_errors(rounded, stats.hessian),
            )
        )
        return tensor

    tensor = stack_rows([solve_rows(rows) for rows in row_blocks(weight, spec)])
    return SolverResult(tensor, damping, n_dead, errors=stack_errors(errors))


@contextmanager
def _damped(hessian: Tensor, ridge: Tensor) -> Iterator[None]:
    """Damp in place and put back exactly: a copy of H would be the largest thing in memory here."""
    diagonal = hessian.diagonal()
    before = diagonal.clone()
    diagonal.add_(ridge)
    yield
    diagonal.copy_(before)


def _shift(pull: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """`W C H^-1`: the change of W that best restores, from the quantized model's inputs, the
    outputs that the layer has in the full-precision model. H^-1 = U^T U in rounding order."""
    pull = pull[:, order]  # by steps, so that no more than two are in memory
    pull = pull @ factor.T
    pull = pull @ factor
    restored = torch.empty_like(pull)
    restored[:, order] = pull
    return restored


def _ridge(hessian: Tensor, dead: Tensor, share: float) -> Tensor:
    """What is added to the diagonal: a share of its mean, and the whole mean in dead columns."""
    mean = hessian.diagonal().mean()
    return share * mean + dead * mean.clamp_min(1e-6)


class _Solve:
    """The column loop and its state: W^T in rounding order, codes, and the scales chosen so far."""

    def __init__(
        self,
        weight: Tensor,
        order: Tensor,
        importance: Tensor | None,
        spec: QuantSpec,
        options: GPTQOptions,
    ) -> None:
        n, k = weight.shape
        self.spec, self.order, self.importance = spec, order, importance
        self.group_size = spec.columns_per_group(k)
        self.static = options.order == "static" and spec.group_size > 0
        self.keeps_g_idx = options.order == "act" and spec.n_groups(k) > 1
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
            self._set_scales(slice(None), weight, spec, importance)

    def _set_scales(
        self, groups: slice | int, weight: Tensor, spec: QuantSpec, importance: Tensor | None
    ) -> None:
        scale, zero = rounding.choose_scale(weight, spec, importance)
        self.scale_t[groups] = scale.T if isinstance(groups, slice) else scale[:, 0]
        if zero is not None:
            self.zero_t[groups] = zero.T if isinstance(groups, slice) else zero[:, 0]
            self.low_t[groups], self.high_t[groups] = (
                -self.zero_t[groups],
                spec.levels.max - self.zero_t[groups],
            )

    def _enter_group(self, start: int, stop: int) -> None:
        """Choose the scales of the group at positions start..stop from the weights as they are
        now."""
        importance = None if self.importance is None else self.importance[self.order[start:stop]]
        whole = replace(
            self.spec, group_size=PER_TENSOR if self.spec.group_size == PER_TENSOR else PER_ROW
        )
        self._set_scales(
            int(self.group_of[start]), self.weight_t[start:stop].T.contiguous(), whole, importance
        )

    def run(self, factor: Tensor) -> None:
        """Round all columns. factor: U of the reordered Hessian."""
        k = len(self.order)
        boundaries = (
            torch.nonzero(self.group_of.diff()).flatten().add_(1).tolist()
            if not self.static
            else []
        )
        group_starts = [0, *boundaries]
        group_stops = dict(zip(group_starts, [*boundaries, k], strict=True))
        for start in (starts := _block_starts(k, group_starts)):
            stop = min([s for s in starts if s > start], default=k)
            rows = factor[start:stop, start:] / factor.diagonal()[start:stop, None]
            errors = self._round_block(
                start, stop, rows[:, : stop - start], {} if self.static else group_stops
            )
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
        self.codes_t[start:stop] = integers.add_(self.zero_t[groups])
        return errors

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


def _block_starts(k: int, group_starts: list[int]) -> list[int]:
    """Blocks of at most 128 columns. A group longer than a block starts one, since its scales need
    every earlier repair; shorter groups see the repairs of their own block."""
    longest = max(
        (b - a for a, b in zip(group_starts, [*group_starts[1:], k], strict=True)), default=k
    )
    if longest < BLOCK_COLUMNS:
        per_block = max(1, BLOCK_COLUMNS // longest)
        return group_starts[::per_block]
    return [
        start
        for a, b in zip(group_starts, [*group_starts[1:], k], strict=True)
        for start in range(a, b, BLOCK_COLUMNS)
    ]


class GPTQ(Rounding):
    """Every layer by `gptq`, under the Hessian of its inputs."""

    def check(self, recipe: Recipe) -> None:
        check_no_init(recipe)

    def needs(self, recipe: Recipe) -> Needs:
        return Needs(text=True, hessian=True, both_streams=recipe.inputs == "both")

    def solve(
        self, weight: Tensor, stats: LayerStats | None, spec: QuantSpec, recipe: Recipe
    ) -> SolverResult:
        assert stats is not None
        options = GPTQOptions(
            recipe.order, recipe.damping, recipe.search, recipe.sweeps, recipe.alpha
        )
        return gptq(weight, stats, spec, options)

    def solve_bytes(self, shape: Shape) -> int:
        """Hessian, its reordered copy, factor and inverse factor, and what rounding holds."""
        n, k = shape
        return 16 * k * k + 2 * 13 * n * k

    def solve_flops(self, shape: Shape) -> float:
        """Factorization, column updates and error reports; the search of scales and the descent."""
        n, k = shape
        return k**3 + 6 * n * k * k + 8 * 31 * 8 * n * k


METHOD = GPTQ()
