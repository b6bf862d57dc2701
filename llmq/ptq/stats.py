"""What a layer solver knows about a layer's inputs: the Hessian of its squared output error, shared
by all layers that read the same input."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.activations.ranges import RangeObserver


def block_columns(k: int) -> int:
    """Columns of H `[k, k]` that are accumulated together. Smaller blocks skip more of the upper
    triangle, larger ones multiply faster: 128 are best for k = 256 and 768, 256 for k = 2048."""
    return min(256, max(128, k // 8))


class LayerStats:
    """Running `H = 2 / n * sum_t x_t x_t^T` in float32 over the rows of every batch added (Frantar
    et al., GPTQ, 2022, section 3).

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
    of either, float32 holds each to 1e-6, and no batch of differences has to be computed."""

    def __init__(
        self,
        k: int,
        device: torch.device | str = "cpu",
        *,
        cross: bool = False,
        projection: Tensor | None = None,
        ranges: RangeObserver | None = None,
    ) -> None:
        self.hessian = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.projection = None if projection is None else projection.float()
        self.cross = (
            torch.zeros(
                k if projection is None else len(projection), k, dtype=torch.float32, device=device
            )
            if cross
            else None
        )
        self.ranges = ranges
        self.exact_energy = 0.0
        self.n_tokens = 0
        self.n_dropped = 0

    def add(self, x: Tensor, full_precision: Tensor | None = None) -> None:
        """Add inputs `[..., K]`, and `[..., K or N]` of the full-precision model. A running mean,
        not a sum: 262,144 tokens of magnitude 100 would not fit the 24 bits of a float32 sum."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        exact = (
            rows
            if full_precision is None
            else full_precision.reshape(len(rows), -1).to(torch.float32)
        )
        if not bool(
            torch.isfinite(rows.sum() + exact.sum())
        ):  # one pass instead of three; a NaN or infinity cannot hide in a sum
            finite = torch.isfinite(rows).all(dim=1) & torch.isfinite(exact).all(dim=1)
            self.n_dropped += int((~finite).sum())
            rows, exact = rows[finite], exact[finite]
        n_new = rows.shape[0]
        if n_new == 0:
            return
        if self.ranges is not None:
            self.ranges.add(rows)
        n_total = self.n_tokens + n_new
        share = {"beta": self.n_tokens / n_total, "alpha": 2 / n_total}
        step = block_columns(rows.shape[1])
        for start in range(0, rows.shape[1], step):
            block = slice(start, start + step)
            self.hessian[start:, block].addmm_(rows[:, start:].T, rows[:, block], **share)
        if self.cross is not None:
            self.cross.addmm_(exact.T, rows, **share)
            if self.projection is not None:
                energy = float(exact.square().sum(dtype=torch.float64)) / n_total
                self.exact_energy = self.exact_energy * self.n_tokens / n_total + energy
        self.n_tokens = n_total

    def finish(self) -> LayerStats:
        """Complete H above its diagonal and C, once all inputs are added."""
        step = block_columns(len(self.hessian))
        for start in range(0, len(self.hessian), step):
            stop = start + step
            self.hessian[start:stop, stop:] = self.hessian[stop:, start:stop].T
        if self.cross is not None:
            self.cross.sub_(self.hessian) if self.projection is None else self.cross.addmm_(
                self.projection, self.hessian, alpha=-1
            )
        return self

    def exact_error(self, weight: Tensor, quantized: Tensor) -> float | None:
        """Mean squared distance of a quantized layer's outputs Q x from those that its weight W
        `[N, K]` has in the full-precision model, W y, over the squared length of these; None
        without `projection`. With R = Q - W it is the mean of |R x|^2 - 2 R x . W (y - x) + |W (y -
        x)|^2, all of which H, W C and |W y|^2 hold."""
        if self.cross is None or self.projection is None or not self.exact_energy:
            return None
        moved = quantized - weight
        correlated = float((quantized * self.cross).sum(dtype=torch.float64))
        own = output_error(weight, self.hessian)
        distance = output_error(moved, self.hessian) - correlated + self.exact_energy - own
        return max(0.0, distance) / self.exact_energy

    def pull(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """`W C` `[N, K]`: the correlation of a layer's missing output with its input. Weight `[N,
        K]`: these rows of the layer's."""
        assert self.cross is not None
        return weight @ self.cross if self.projection is None else self.cross[rows]


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """`diag(D H D^T) / 2`, float64 `[N]`: the mean squared output error per token of each row of a
    weight difference D `[N, K]`."""
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64) / 2


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """The same summed over rows."""
    return float(row_errors(difference, hessian).sum())
