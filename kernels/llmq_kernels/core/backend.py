"""What a backend is: one frozen record, which stands beside the code that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.core import capability
from llmq_kernels.core.capability import Takes
from llmq_kernels.core.weight import PackedWeight

State = dict[str, Tensor]


@dataclass(frozen=True)
class Backend:
    """takes: what it was built for. obstacle(weight, dtype, device): why it cannot take a weight of
    these on this machine, or None. prepare(weight, dtype): tensors in the backend's own layout;
    when it returns a tensor named `packed`, that replaces the canonical words. linear(x, weight,
    state): `x @ W.T` in x's dtype for x `[M, K]`. restore(weight, state): canonical words.
    bias_linear(x, weight, state, bias): the same with the bias added, for backends that do so on
    the way. dequantize(weight, state, dtype): `[N, K]` from the backend's own layout, for
    gradients; by default from the restored words. rows(weight, state, index): canonical words of
    the rows in index, int64 `[n]`, from the backend's own layout, so that embeddings which are
    the output head too need no copy of their own; None where the layout does not show single
    rows."""

    name: str
    takes: tuple[Takes, ...]
    obstacle: Callable[[PackedWeight, torch.dtype, torch.device], str | None]
    prepare: Callable[[PackedWeight, torch.dtype], State]
    linear: Callable[[Tensor, PackedWeight, State], Tensor]
    restore: Callable[[PackedWeight, State], Tensor]
    bias_linear: Callable[[Tensor, PackedWeight, State, Tensor], Tensor] | None = None
    dequantize: Callable[[PackedWeight, State, torch.dtype], Tensor] | None = None
    rows: Callable[[PackedWeight, State, Tensor], Tensor] | None = None

    def refusal(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend cannot take a weight with activations of `dtype` on `device`, or
        None."""
        return capability.refusal(self.takes, weight, dtype, device) or self.obstacle(
            weight, dtype, device
        )

    def is_for_cpus(self) -> bool:
        """Whether all that it takes is on CPUs; `reference` counts."""
        return all(takes.devices in (None, ("cpu",)) for takes in self.takes)


def no_obstacle(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """The obstacle of a backend that runs on every machine."""
    return None
