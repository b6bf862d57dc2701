"""Hidden states on disk: the inputs of one block, or of one layer, for every calibration sequence,
in one flat file.

Activations of 128 sequences of 2048 tokens take 4 GB at a width of 4096: more than the block they
belong to. They therefore never live in memory as a whole. Batches are read and written with plain
file calls, so the operating system keeps in its page cache what fits and lets the rest go to disk;
no budget has to be guessed, and the same files are what an interrupted run resumes from.
Memory-mapping was not taken because mapped pages count as resident memory of the process.

A durable file is sealed: its hash is taken while it is written, and a run that resumes checks it.
Seals stay when the file is given up, to tell whether what is computed again is the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.storage import files, seals


@dataclass(frozen=True)
class ActivationFile:
    """`[n_sequences, length, width]` of one dtype in native byte order at `path`."""

    path: Path
    length: int
    width: int
    dtype: torch.dtype = torch.float32

    @property
    def sequence_bytes(self) -> int:
        return self.length * self.width * self.dtype.itemsize

    @property
    def n_sequences(self) -> int:
        return self.path.stat().st_size // self.sequence_bytes

    def batches(self, sizes: int | Iterable[int]) -> Generator[Tensor, None, None]:
        """Tensors `[n, length, width]`, in order: of so many sequences, the last of what is left,
        or one for each of the sizes."""
        with self.path.open("rb", buffering=0) as file:
            for size in parts_of(self.n_sequences, sizes):
                batch = torch.empty(size, self.length, self.width, dtype=self.dtype)
                self._fill(file, batch)
                yield batch

    def sequences(self, indices: Sequence[int]) -> Tensor:
        """Single sequences `[len(indices), length, width]`, in any order."""
        found = torch.empty(len(indices), self.length, self.width, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for i, index in enumerate(indices):
                file.seek(index * self.sequence_bytes)
                self._fill(file, found[i])
        return found

    def _fill(self, file: FileIO, tensor: Tensor) -> None:
        buffer = _bytes_of(tensor)
        n_read = 0
        while n_read < len(buffer):
            n_read += file.readinto(buffer[n_read:]) or _truncated(self.path)

    @contextmanager
    def appender(self, *, durable: bool = True) -> Iterator[Callable[[Tensor], None]]:
        """A function that appends a batch. The file appears under its name, and if durable safely
        on disk and sealed, only when the block of code ends without an error."""
        sha256, n_bytes = hashlib.sha256(), 0
        with files.reuse(self._partial) as file:

            def append(batch: Tensor) -> None:
                nonlocal n_bytes
                buffer = _bytes_of(batch.to("cpu", self.dtype).contiguous())
                n_written = 0
                while n_written < len(buffer):
                    n_written += file.write(buffer[n_written:])
                n_bytes += n_written
                if durable:
                    sha256.update(buffer)

            yield append
            file.truncate()
            if durable:
                os.fsync(file.fileno())
        self._partial.replace(self.path)
        if durable:
            seals.seal(self.path, {"sha256": sha256.hexdigest(), "bytes": n_bytes})

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The digest of what was last written here, also after it was given up."""
        return seals.recorded(self.path)

    @property
    def is_sound(self) -> bool:
        """Whether the file is there as it was written."""
        return seals.is_sound(self.path)

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".tmp")

    def recycle(self, successor: ActivationFile | None = None) -> None:
        """Give the file up, but not its pages: the next one of this name, or the successor, is
        written over them, which takes half the time of new ones."""
        if files.is_plain_file(self.path):
            self.path.replace((successor or self)._partial)


def parts_of(n: int, sizes: int | Iterable[int]) -> Iterator[int]:
    """How n things are taken, so many at a time or by these sizes."""
    if not isinstance(sizes, int):
        yield from sizes
        return
    for start in range(0, n, sizes):
        yield min(sizes, n - start)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without copying."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data).cast("B")


def _truncated(path: Path) -> int:
    raise OSError(f"{path}: ends in the middle of a batch")
