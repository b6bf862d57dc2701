"""What a layer solver knows about a layer's inputs: the Hessian of its squared output error, shared by all layers that read the same input."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerStats:
    """Running `H = 2 / n * sum_t x_t x_t^T` in float32 over the rows of every batch added (Frantar et al., GPTQ, 2022, section 3).

    hessian: float32 `[K, K]`. cross: float32 `[K, K]`, `2 / n * sum_t (y_t - x_t) x_t^T` with the inputs y that the same layer has in the full-precision model, or None when
    these are not given. n_tokens: rows counted. n_dropped: rows left out because they held NaN or infinity.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu", *, cross: bool = False) -> None:
        self.hessian = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self.hessian) if cross else None
        self.n_tokens = 0
        self.n_dropped = 0

    def add(self, x: Tensor, full_precision: Tensor | None = None) -> None:
        """Add inputs `[..., K]`. A running mean, not a sum: 262,144 tokens of magnitude 100 would not fit the 24 bits of a float32 sum."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        exact = rows if full_precision is None else full_precision.reshape(rows.shape).to(torch.float32)
        if not bool(torch.isfinite(rows.sum() + exact.sum())):  # one pass instead of three; a NaN or infinity cannot hide in a sum
            finite = torch.isfinite(rows).all(dim=1) & torch.isfinite(exact).all(dim=1)
            self.n_dropped += int((~finite).sum())
            rows, exact = rows[finite], exact[finite]
        n_new = rows.shape[0]
        if n_new == 0:
            return
        n_total = self.n_tokens + n_new
        self.hessian.addmm_(rows.T, rows, beta=self.n_tokens / n_total, alpha=2 / n_total)
        if self.cross is not None:
            self.cross.addmm_((exact - rows).T, rows, beta=self.n_tokens / n_total, alpha=2 / n_total)
        self.n_tokens = n_total


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T) / 2`: the mean squared output error per token, summed over rows, of a weight difference D `[N, K]`."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64)) / 2
