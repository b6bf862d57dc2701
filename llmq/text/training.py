"""Training windows, and the held-out ones that decide whether training helped."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmq.errors import LlmqError


class TokenWindows(Dataset):  # type: ignore[type-arg]
    """Windows int64 `[n, T]` as the Trainer takes them."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


def split_windows(
    row: Tensor, length: int, n_held_out: int, n_per_step: int, source: str
) -> tuple[Tensor, Tensor]:
    """Cut a row of tokens into disjoint windows `[n, length]`: those to train on, and up to
    `n_held_out` (at most a tenth) spread evenly over the text, which are not.

    Raises `LlmqError` when what is left is less than one step.
    """
    n = len(row) // length
    windows = row[: n * length].view(n, length)
    n_held_out = min(n_held_out, n // 10)
    held = torch.zeros(n, dtype=torch.bool)
    if n_held_out:
        held[(torch.arange(n_held_out) * n) // n_held_out + n // (2 * n_held_out)] = True
    if n - n_held_out < n_per_step:
        has = (
            f"{len(row)} tokens make {n - n_held_out} windows of {length} to train on, but one "
            f"step needs {n_per_step}"
        )
        raise LlmqError(
            f"training text {source}: {has}; give more text, a smaller --batch-size or "
            "--sequence-length"
        )
    return windows[~held], windows[held]
