"""What a layer solver knows about a layer's inputs: the Hessian of its squared output error, shared
by all layers that read the same input."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.activations.ranges import RangeObserver
from llmq.ptq.ranks import Ranks
from llmq.ptq.threads import total


def block_columns(k: int) -> int:
    """Columns of H `[k, k]` that are accumulated together. Smaller blocks skip more of the upper
    triangle, larger ones multiply faster: 128 are best for k = 256 and 768, 256 for k = 2048."""
    return min(256, max(128, k // 8))


@dataclass
class _Moments:
    """Means over some rows: what is summed of one leaf, or of several. hessian: float32 `[K, K]`,
    on and below the diagonal. cross: `[K or N, K]`. exact_energy: of the projected rows."""

    hessian: Tensor
    cross: Tensor | None
    exact_energy: float = 0.0
    n_tokens: int = 0

    def add(self, rows: Tensor, exact: Tensor, keeps_energy: bool) -> None:
        """Fold in a chunk of rows: product, then sum."""
        n_total = self.n_tokens + len(rows)
        kept, share = self.n_tokens / n_total, 2 / n_total
        step = block_columns(rows.shape[1])
        for start in range(0, rows.shape[1], step):
            block = slice(start, start + step)
            product = rows[:, start:].T @ rows[:, block]
            self.hessian[start:, block].mul_(kept).add_(product, alpha=share)
        if self.cross is not None:
            self.cross.mul_(kept).add_(exact.T @ rows, alpha=share)
            if keeps_energy:
                self.exact_energy = self.exact_energy * kept + total(exact.square()) / n_total
        self.n_tokens = n_total

    def merge(self, other: _Moments) -> None:
        """Take the rows of what comes next in the tree."""
        n_total = self.n_tokens + other.n_tokens
        if n_total == 0:
            return
        kept, share = self.n_tokens / n_total, other.n_tokens / n_total
        self.hessian.mul_(kept).add_(other.hessian, alpha=share)
        if self.cross is not None and other.cross is not None:
            self.cross.mul_(kept).add_(other.cross, alpha=share)
        self.exact_energy = self.exact_energy * kept + other.exact_energy * share
        self.n_tokens = n_total


class LayerStats:
    """`H = 2 / n * sum_t x_t x_t^T` in float32 over the rows of every chunk added (Frantar et al.,
    GPTQ, 2022, section 3); where rows have weights w, of w_t x_t x_t^T, and so in all sums below.

    hessian: float32 `[K, K]`; H is symmetric, so only blocks on and below the diagonal are
    accumulated, and `finish` mirrors them. cross: None, or what the layer's inputs x lack of the
    inputs y that it has in the full-precision model: `C = 2 / n * sum_t (y_t - x_t) x_t^T`, float32
    `[K, K]`. exact_energy: with `projection`, the mean squared length of W y. ranges: extremes and
    samples of the inputs, for static activation ranges, or None. n_tokens: rows counted. n_dropped:
    rows left out because they held NaN or infinity.

    All that a solver wants of C is W C. With `projection`, the layer's weight W `[N, K]`, the
    full-precision rows that are added are the layer's outputs W y instead of y, and `cross` is W C
    `[N, K]`. For a layer that narrows (down_proj) that is less to keep and to multiply. In both
    cases sum y x^T is accumulated and H subtracted once at the end. The difference is some percent
    of either, float32 holds each to 1e-6, and no batch of differences has to be computed.

    The sum is the tree of `llmq.ptq.leaves`: so many `chunks` belong to each leaf, one after the
    other, and leaves are merged in pairs. At most three parts wait beside the leaf that grows."""

    def __init__(
        self,
        k: int,
        device: torch.device | str = "cpu",
        *,
        cross: bool = False,
        projection: Tensor | None = None,
        ranges: RangeObserver | None = None,
        chunks: Sequence[int] = (1,),
    ) -> None:
        self.k, self.device = k, device
        self.has_cross = cross
        self._stops = list(itertools.accumulate(chunks))[:-1]  # of the leaves but the last
        self.projection = None if projection is None else projection.float()
        self.ranges = ranges
        self.n_dropped = 0
        self._n_added = 0
        self._moments = self._empty()
        self._waiting: list[tuple[int, _Moments]] = []  # height in the tree, means
        self.hessian, self.cross = self._moments.hessian, self._moments.cross
        self.exact_energy = 0.0

    @property
    def n_tokens(self) -> int:
        return self._moments.n_tokens + sum(moments.n_tokens for _, moments in self._waiting)

    def forget_cross(self) -> None:
        """Give C up; what outlives a solve is H."""
        self.cross = self._moments.cross = None

    def add(
        self, x: Tensor, full_precision: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add a chunk of inputs `[..., K]`, and `[..., K or N]` of the full-precision model.
        weights: `[...]`, what the squared error of each row counts, 1 on average. Means, not sums:
        262,144 tokens of magnitude 100 would not fit the 24 bits of a float32 sum."""
        while self._stops and self._n_added == self._stops[0]:
            self._close_leaf()
            del self._stops[0]
        self._n_added += 1
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        exact = (
            rows
            if full_precision is None
            else full_precision.reshape(-1, full_precision.shape[-1]).to(torch.float32)
        )
        if not bool(
            torch.isfinite(rows.sum() + exact.sum())
        ):  # one pass instead of three; a NaN or infinity cannot hide in a sum
            finite = torch.isfinite(rows).all(dim=1) & torch.isfinite(exact).all(dim=1)
            self.n_dropped += int((~finite).sum())
            rows, exact = rows[finite], exact[finite]
            weights = None if weights is None else weights.flatten()[finite]
        if not len(rows):
            return
        if self.ranges is not None:
            self.ranges.add(rows)
        if weights is not None:
            factors = weights.reshape(-1, 1).sqrt()
            rows, exact = rows * factors, exact * factors
        self._moments.add(rows, exact, self.projection is not None)

    def gather(self, ranks: Ranks, owner: int) -> None:
        """Merge the parts of the tree that other processes have, once all inputs are added. What
        comes of it is with the owner alone; what the others have left is of no use."""
        self._close_tree()
        width = 1
        while width < ranks.size:
            left = ranks.rank // (2 * width) * 2 * width
            one, other = _place(owner, left, width), _place(owner, left + width, width)
            if ranks.rank in (one, other):
                self._meet(ranks, one, other, _place(owner, left, 2 * width))
            width *= 2

    def _meet(self, ranks: Ranks, left: int, right: int, target: int) -> None:
        """Merge what two processes have, of which one is the target."""
        source = right if target == left else left
        own = self._moments
        tensors = [own.hessian, *([] if own.cross is None else [own.cross])]
        state = torch.empty(0) if self.ranges is None else self.ranges.state()
        values = [own.exact_energy, own.n_tokens, self.n_dropped]
        counts = torch.tensor([*values, len(state)], dtype=torch.float64)
        if ranks.rank == source:
            for tensor in (*tensors, counts, *([state] if len(state) else [])):
                ranks.send(tensor, target)
            return
        found = [ranks.receive(tensor, source) for tensor in tensors]
        energy, n_tokens, n_dropped, n_state = ranks.receive(counts, source).tolist()
        if self.ranges is not None:
            self.ranges.merge(ranks.receive(torch.empty(int(n_state)), source))
        self.n_dropped += int(n_dropped)
        cross = found[1] if len(found) > 1 else None
        other = _Moments(found[0], cross, energy, int(n_tokens))
        first, second = (own, other) if target == left else (other, own)
        first.merge(second)
        self._moments = first

    def _close_tree(self) -> None:
        while self._waiting:
            _, earlier = self._waiting.pop()
            earlier.merge(self._moments)
            self._moments = earlier

    def finish(self) -> LayerStats:
        """Complete H above its diagonal and C, once all inputs are added."""
        self._close_tree()
        hessian = self.hessian = self._moments.hessian
        self.cross, self.exact_energy = self._moments.cross, self._moments.exact_energy
        step = block_columns(self.k)
        for start in range(0, self.k, step):
            stop = start + step
            hessian[start:stop, stop:] = hessian[stop:, start:stop].T
        if self.cross is not None:
            if self.projection is None:
                self.cross.sub_(hessian)
            else:
                self.cross.addmm_(self.projection, hessian, alpha=-1)
        return self

    def blend(self, other: LayerStats, share: float) -> LayerStats:
        """The means of both, once they are finished, `share` of them these. Rows are counted as
        here."""
        found = copy.copy(self)
        found.hessian = self.hessian * share + other.hessian * (1 - share)
        if self.cross is not None and other.cross is not None:
            found.cross = self.cross * share + other.cross * (1 - share)
        found.exact_energy = self.exact_energy * share + other.exact_energy * (1 - share)
        return found

    def _empty(self) -> _Moments:
        cross = None
        if self.has_cross:
            n = self.k if self.projection is None else len(self.projection)
            cross = torch.zeros(n, self.k, dtype=torch.float32, device=self.device)
        return _Moments(torch.zeros(self.k, self.k, dtype=torch.float32, device=self.device), cross)

    def _close_leaf(self) -> None:
        """Put the grown leaf into the tree, whose equal heights are merged at once."""
        if self.ranges is not None:
            self.ranges.next_leaf()
        height, grown = 0, self._moments
        while self._waiting and self._waiting[-1][0] == height:
            _, earlier = self._waiting.pop()
            earlier.merge(grown)
            height, grown = height + 1, earlier
        self._waiting.append((height, grown))
        self._moments = self._empty()

    def exact_error(self, weight: Tensor, quantized: Tensor) -> float | None:
        """Mean squared distance of a quantized layer's outputs Q x from those that its weight W
        `[N, K]` has in the full-precision model, W y, over the squared length of these; None
        without `projection`. With R = Q - W it is the mean of |R x|^2 - 2 R x . W (y - x) + |W (y -
        x)|^2, all of which H, W C and |W y|^2 hold."""
        if self.cross is None or self.projection is None or not self.exact_energy:
            return None
        moved = quantized - weight
        correlated = total(quantized * self.cross)
        own = output_error(weight, self.hessian)
        distance = output_error(moved, self.hessian) - correlated + self.exact_energy - own
        return max(0.0, distance) / self.exact_energy

    def pull(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """`W C` `[N, K]`: the correlation of a layer's missing output with its input. Weight `[N,
        K]`: these rows of the layer's."""
        assert self.cross is not None
        return weight @ self.cross if self.projection is None else self.cross[rows]


def _place(owner: int, first: int, width: int) -> int:
    """Which of so many processes from the first on has what they have together."""
    return owner if first <= owner < first + width else first


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """`diag(D H D^T) / 2`, float64 `[N]`: the mean squared output error per token of each row of a
    weight difference D `[N, K]`."""
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64) / 2


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """The same summed over rows."""
    return total(row_errors(difference, hessian))
