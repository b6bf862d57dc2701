"""What depends on the number of threads, and how it does not.

torch and its libraries split a product by its outputs, so that every number is summed in one order
however many threads there are. Factorizations and sums of everything into one number are split
otherwise; they take one thread here, and the bytes of a result are those of any number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operators on one thread."""
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def total(values: Tensor) -> float:
    """The sum of all values in float64."""
    with one_thread():
        return float(values.sum(dtype=torch.float64))
