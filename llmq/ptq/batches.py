"""Windows as a model takes them: batches of tokens, with what belongs to their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmq.text.picture_windows import PictureInputs

BATCH = 4  # windows that run through a block at a time, where gradients or a head come with it


@dataclass(frozen=True)
class Batches:
    """tokens: int64 `[n, T]`. size: windows in a batch. device: where they run. pictures: what is
    read for a batch when it is asked for."""

    tokens: Tensor
    size: int
    device: str = "cpu"
    pictures: PictureInputs | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.tokens), self.size):
            yield self.of(range(start, min(start + self.size, len(self.tokens))))

    def of(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """The model's arguments for some windows, by name."""
        found = {"input_ids": self.tokens[list(windows)]}
        if self.pictures is not None:
            found |= self.pictures.of(windows)
        return {name: value.to(self.device) for name, value in found.items()}
