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

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor, stack_rows
from llmq.ptq.methods.base import Needs, Rounding, Shape, check_no_init
from llmq.ptq.methods.columns import LANES, ColumnLoop, LoopsTogether, Order
from llmq.ptq.methods.refine import refine, refine_together
from llmq.ptq.solver import RowErrors, SolverResult, row_blocks, stack_errors
from llmq.ptq.stats import LayerStats, row_errors
from llmq.ptq.threads import one_thread
from llmq.recipe import Recipe

# Of layers side by side. Beyond some thousand rows, caches count more than calls do.
ROWS_TOGETHER = 4096
BYTES_TOGETHER = 128 << 20


@dataclass(frozen=True)
class GPTQOptions:
    """order: see the module's text. damping: added to diag(H), as a share of its median; times 10
    until the factorization succeeds, until it is the whole mean. search: choose scales and zero
    points by the error that is left of each rounding, instead of by range. sweeps: passes of
    coordinate descent over codes and scales afterwards (`llmq.ptq.methods.refine`). alpha: the
    share of the correction for what the layers before this one lost, where the statistics carry it
    (GPTAQ, Li et al., 2025; there folded into the column loop, here a change of the target
    beforehand, which is the same least squares problem and leaves loop and descent as they are)."""

    order: Order = "group"
    damping: float = 0.1
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
    """The factor of the reordered, damped Hessian, and the damping (share of the median diagonal)
    at which it succeeded. Dead columns get the mean as their diagonal."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean() / typical_curvature(diagonal))
    most = max(1.0, mean) if math.isfinite(mean) else 1.0
    share = min(damping, most)
    while (
        factor := factor_of_reversed(_damped_reversed(hessian, order, dead, share))
    ) is None and share < most:
        share = min(10 * share, most)
    return factor, share


def typical_curvature(diagonal: Tensor) -> Tensor:
    """The median of diag(H) over columns that are not dead. The mean would be that of a few: where
    attention rests on one token, that token alone can be 99.9% of it."""
    return torch.where(diagonal == 0, torch.nan, diagonal).nanmedian().nan_to_num(1.0)


def errors_left(factor: Tensor, order: Tensor) -> Tensor:
    """What a squared rounding error of each column costs once the columns behind it have repaired
    what they can: `1 / U_ii^2`, float32 `[K]`. factor: U in rounding order."""
    left = torch.empty_like(factor.diagonal())
    left[order] = factor.diagonal().square().reciprocal()
    return left


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


@dataclass(frozen=True)
class _Layer:
    """A layer before its columns are rounded. weight: float32 `[N, K]`, zero in dead columns.
    order: int64 `[K]`. importance: of columns, where scales are searched for. factor: U of the
    reordered Hessian, damped by that share of its median diagonal, or None. dead: bool `[K]`."""

    weight: Tensor
    stats: LayerStats
    spec: QuantSpec
    options: GPTQOptions
    order: Tensor
    importance: Tensor | None
    factor: Tensor | None
    damping: float
    dead: Tensor

    def group_sizes(self) -> tuple[int, ...]:
        """Of the columns of each group, in rounding order."""
        groups = self.order // self.spec.columns_per_group(len(self.order))
        return tuple(torch.unique_consecutive(groups, return_counts=True)[1].tolist())

    @property
    def whole(self) -> slice:
        """All rows."""
        return slice(0, len(self.weight))

    def target(self, rows: slice) -> Tensor:
        """What some rows are solved for: the weight, or the corrected one."""
        part = self.weight[rows]
        if self.stats.cross is None or not self.options.alpha:
            return part
        assert self.factor is not None
        shift = _shift(self.stats.pull(part, rows), self.order, self.factor)
        return torch.add(part, shift, alpha=self.options.alpha)

    def loop(self, target: Tensor) -> ColumnLoop:
        return ColumnLoop(target, self.order, self.importance, self.spec, self.options.order)

    def errors(self, rows: slice, target: Tensor, tensor: QuantizedTensor) -> RowErrors:
        """How far some rows, and plain rounding of them, are from their target."""
        rounded = QuantizedTensor.quantize(self.weight[rows], self.spec).dequantize().sub_(target)
        hessian = self.stats.hessian
        return RowErrors(
            row_errors(tensor.dequantize().sub_(target), hessian), row_errors(rounded, hessian)
        )

    def result(self, tensor: QuantizedTensor, errors: RowErrors) -> SolverResult:
        return SolverResult(tensor, self.damping, int(self.dead.sum()), errors=errors)

    def rounded(self) -> SolverResult:
        """Without a factor."""
        tensor = QuantizedTensor.quantize(self.weight, self.spec, self.importance)
        n_dead = int(self.dead.sum())
        return SolverResult(tensor, self.damping, n_dead, "Hessian not positive definite")


def _prepared(weight: Tensor, stats: LayerStats, spec: QuantSpec, options: GPTQOptions) -> _Layer:
    if spec.levels.offset % 1:
        raise LlmqError(
            f"GPTQ has no column loop for {spec}, whose levels lie between whole numbers; use "
            "--method rtn, or w2g64-asym"
        )
    diagonal = stats.hessian.diagonal().clone()
    dead = diagonal == 0
    if bool(dead.any()):
        weight = weight.masked_fill(dead, 0)
    order = column_order(diagonal, spec.columns_per_group(weight.shape[1]), options.order)
    factor, damping = _damped_factor(stats.hessian, order, dead, options.damping)
    importance = None
    if options.search:
        importance = diagonal if factor is None else errors_left(factor, order)
    return _Layer(weight, stats, spec, options, order, importance, factor, damping, dead)


def gptq(
    weight: Tensor, stats: LayerStats, spec: QuantSpec, options: GPTQOptions = GPTQOptions()
) -> SolverResult:
    """Quantize a float32 weight `[N, K]`. Falls back to plain rounding, and says so, when the
    Hessian stays singular with all its mean diagonal added."""
    layer = _prepared(weight, stats, spec, options)
    if layer.factor is None:
        return layer.rounded()
    tensors, errors = [], []
    for rows in row_blocks(weight, spec):
        target = layer.target(rows)
        loop = layer.loop(target)
        loop.run(layer.factor)
        tensor = loop.result()
        del loop
        if options.sweeps:
            with _damped([layer]):
                tensor = refine(target, tensor, stats.hessian, options.sweeps)
        tensors.append(tensor)
        errors.append(layer.errors(rows, target, tensor))
    return layer.result(stack_rows(tensors), stack_errors(errors))


def gptq_together(
    weights: Sequence[Tensor],
    stats: Sequence[LayerStats],
    spec: QuantSpec,
    options: GPTQOptions = GPTQOptions(),
) -> list[SolverResult]:
    """What `gptq` makes of each of several weights of one shape, bit for bit, with far fewer
    calls: see `llmq.ptq.methods.columns`."""
    n_together = _n_together(weights[0], spec, options)
    results: list[SolverResult] = []
    for start in range(0, len(weights), n_together):
        some, own = weights[start : start + n_together], stats[start : start + n_together]
        if len(some) == 1:
            results.append(gptq(some[0], own[0], spec, options))
        else:
            pairs = zip(some, own, strict=True)
            results += _solve_together([_prepared(*pair, spec, options) for pair in pairs])
    return results


def _n_together(weight: Tensor, spec: QuantSpec, options: GPTQOptions) -> int:
    """How many layers like this one are solved side by side."""
    n, k = weight.shape
    # One scale ties all rows together, and act-order leaves groups that differ by layer.
    is_apart = spec.group_size == PER_TENSOR or options.order == "act"
    if is_apart or n % LANES or len(row_blocks(weight, spec)) > 1:
        return 1
    return most_together(n, k)


def most_together(n: int, k: int) -> int:
    """How many layers `[N, K]` are, at most."""
    return max(1, min(ROWS_TOGETHER // n, BYTES_TOGETHER // (4 * k * k + 14 * n * k)))


def _solve_together(layers: Sequence[_Layer]) -> list[SolverResult]:
    """Those with a factor, as long as their groups lie alike along the way: a shorter last group
    comes where its columns count."""
    results: dict[int, SolverResult] = {}
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        if layer.factor is None:
            results[number] = layer.rounded()
        else:
            alike.setdefault(layer.group_sizes(), []).append(number)
    for numbers in alike.values():
        found = _side_by_side([layers[number] for number in numbers])
        results.update(zip(numbers, found, strict=True))
    return [results[number] for number in range(len(layers))]


def _side_by_side(layers: Sequence[_Layer]) -> list[SolverResult]:
    n_sweeps = layers[0].options.sweeps
    targets = [layer.target(layer.whole) for layer in layers]
    loops = [layer.loop(target) for layer, target in zip(layers, targets, strict=True)]
    LoopsTogether(loops).run([layer.factor for layer in layers if layer.factor is not None])
    tensors = [loop.result() for loop in loops]
    del loops
    if n_sweeps:
        with _damped(layers):
            hessians = [layer.stats.hessian for layer in layers]
            tensors = refine_together(targets, tensors, hessians, n_sweeps)
    return [
        layer.result(tensor, layer.errors(layer.whole, target, tensor))
        for layer, target, tensor in zip(layers, targets, tensors, strict=True)
    ]


@contextmanager
def _damped(layers: Sequence[_Layer]) -> Iterator[None]:
    """Damp in place and put back exactly: a copy of H would be the largest thing in memory here.
    Layers may share an H, which is damped once."""
    with ExitStack() as stack:
        for layer in {id(layer.stats.hessian): layer for layer in layers}.values():
            hessian = layer.stats.hessian
            diagonal = hessian.diagonal()
            stack.callback(diagonal.copy_, diagonal.clone())
            diagonal.add_(_ridge(hessian, layer.dead, layer.damping))
        yield


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
    """What is added to the diagonal: a share of its median, and the whole mean in dead columns."""
    diagonal = hessian.diagonal()
    return share * typical_curvature(diagonal) + dead * diagonal.mean().clamp_min(1e-6)


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
        return gptq(weight, stats, spec, _options(recipe))

    def solve_many(
        self,
        weights: Sequence[Tensor],
        stats: Sequence[LayerStats | None],
        spec: QuantSpec,
        recipe: Recipe,
    ) -> list[SolverResult]:
        measured = [own for own in stats if own is not None]
        return gptq_together(weights, measured, spec, _options(recipe))

    def solve_bytes(self, shape: Shape) -> int:
        """Hessian, its reordered copy, factor and inverse factor, and what rounding holds."""
        n, k = shape
        return 16 * k * k + 2 * 13 * n * k

    def together_bytes(self, shape: Shape, n_layers: int) -> int:
        """Of each layer the factor and what rounding holds, its target and result among it; of one
        the reordered Hessian and the inverse factor. The results of all."""
        n, k = shape
        side_by_side = min(n_layers, most_together(n, k))
        each, once = 4 * k * k + 2 * 13 * n * k, 8 * k * k
        return side_by_side * each + once + n_layers * n * k

    def solve_flops(self, shape: Shape) -> float:
        """Factorization, column updates and error reports; the search of scales and the descent."""
        n, k = shape
        return k**3 + 6 * n * k * k + 8 * 31 * 8 * n * k


def _options(recipe: Recipe) -> GPTQOptions:
    return GPTQOptions(recipe.order, recipe.damping, recipe.search, recipe.sweeps, recipe.alpha)


METHOD = GPTQ()
