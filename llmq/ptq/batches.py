"""Windows as a model takes them: batches of tokens, with what belongs to their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmq.storage.hidden_states import parts_of
from llmq.text.picture_windows import PictureInputs

BATCH = 4  # windows that run through a block at a time, where gradients or a head come with it


@dataclass(frozen=True)
class Batches:
    """tokens: int64 `[n, T]`. sizes: windows in a batch, or in each. device: where they run.
    pictures: what is read for a batch when it is asked for."""

    tokens: Tensor
    sizes: int | Sequence[int]
    device: str = "cpu"
    pictures: PictureInputs | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start = 0
        for size in parts_of(len(self.tokens), self.sizes):
            yield self.of(range(start, start + size))
            start += size

    def of(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """The model's arguments for some windows, by name."""
        found = {"input_ids": self.tokens[list(windows)]}
        if self.pictures is not None:
            found |= self.pictures.of(windows)
        return {name: value.to(self.device) for name, value in found.items()}
