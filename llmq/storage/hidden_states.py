"""Hidden states on disk: the inputs of one block, or of one layer, for every calibration sequence,
in one flat file.

Activations of 128 sequences of 2048 tokens take 4 GB at a width of 4096: more than the block they
belong to. They therefore never live in memory as a whole. Batches are read and written with plain
file calls, so the operating system keeps in its page cache what fits and lets the rest go to disk;
no budget has to be guessed, and the same files are what an interrupted run resumes from.
Memory-mapping was not taken because mapped pages count as resident memory of the process. A `Room`
is memory that somebody granted: what fits lies in it instead, and a run that resumes computes it
again.

A durable file is sealed: its hash is taken while it is written, and a run that resumes checks it.
Seals stay when the file is given up, to tell whether what is computed again is the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.storage import files, seals
from llmq.storage.room import Buffer, Room


@dataclass(frozen=True)
class ActivationFile:
    """`[n_sequences, length, width]` of one dtype in native byte order at `path`, or in `room`
    under that name."""

    path: Path
    length: int
    width: int
    dtype: torch.dtype = torch.float32
    room: Room = field(default_factory=Room, compare=False, repr=False)

    @property
    def sequence_bytes(self) -> int:
        return self.length * self.width * self.dtype.itemsize

    @property
    def n_sequences(self) -> int:
        kept = self.room.of(self.path)
        n_bytes = self.path.stat().st_size if kept is None else kept.size
        return n_bytes // self.sequence_bytes

    def batches(self, sizes: int | Iterable[int]) -> Generator[Tensor, None, None]:
        """Tensors `[n, length, width]`, in order: of so many sequences, the last of what is left,
        or one for each of the sizes."""
        with self._reader() as read:
            for size in parts_of(self.n_sequences, sizes):
                batch = torch.empty(size, self.length, self.width, dtype=self.dtype)
                read(_bytes_of(batch), None)
                yield batch

    def sequences(self, indices: Sequence[int]) -> Tensor:
        """Single sequences `[len(indices), length, width]`, in any order."""
        found = torch.empty(len(indices), self.length, self.width, dtype=self.dtype)
        with self._reader() as read:
            for i, index in enumerate(indices):
                read(_bytes_of(found[i]), index * self.sequence_bytes)
        return found

    @contextmanager
    def _reader(self) -> Iterator[Callable[[memoryview, int | None], None]]:
        """A function that fills a buffer with the bytes at an offset, None for those that come
        next."""
        kept = self.room.of(self.path)
        if kept is not None:
            yield _from_memory(kept, self.path)
            return
        with self.path.open("rb", buffering=0) as file:

            def read(target: memoryview, offset: int | None) -> None:
                if offset is not None:
                    file.seek(offset)
                n_read = 0
                while n_read < len(target):
                    n_read += file.readinto(target[n_read:]) or _truncated(self.path)

            yield read

    @contextmanager
    def appender(self, *, durable: bool = True) -> Iterator[Callable[[Tensor], None]]:
        """A function that appends a batch. The file appears under its name, and if durable sealed
        and safely on disk where it does not lie in memory, only when the block of code ends without
        an error."""
        sha256, n_bytes = hashlib.sha256(), 0
        with ExitStack() as stack:
            writer = _Writer(self._partial, self.room, stack)

            def append(batch: Tensor) -> None:
                nonlocal n_bytes
                buffer = _bytes_of(batch.to("cpu", self.dtype).contiguous())
                writer.write(buffer)
                n_bytes += len(buffer)
                if durable:
                    sha256.update(buffer)

            yield append
            writer.finish(durable)
        if self.room.rename(self._partial, self.path):
            self.path.unlink(missing_ok=True)  # an earlier one, for which there was no room
        else:
            self._partial.replace(self.path)
            self.room.remove(self.path)
        if durable:
            seals.seal(self.path, {"sha256": sha256.hexdigest(), "bytes": n_bytes})

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The digest of what was last written here, also after it was given up."""
        return seals.recorded(self.path)

    @property
    def is_sound(self) -> bool:
        """Whether the file is there as it was written."""
        return self.room.of(self.path) is not None or seals.is_sound(self.path)

    @property
    def _partial(self) -> Path:
        return self.path.with_suffix(".tmp")

    def recycle(self, successor: ActivationFile | None = None) -> None:
        """Give the file up, but not its pages: the next one of this name, or the successor, is
        written over them, which takes half the time of new ones."""
        target = (successor or self)._partial
        if not self.room.rename(self.path, target) and files.is_plain_file(self.path):
            self.path.replace(target)

    def remove(self) -> None:
        """Give the file and its pages up, where it is there."""
        self.room.remove(self.path)
        self.path.unlink(missing_ok=True)


class _Writer:
    """Takes bytes into memory as long as there is room, and all of them to a file from then on."""

    def __init__(self, path: Path, room: Room, stack: ExitStack) -> None:
        self.path, self.room, self.stack = path, room, stack
        self.kept: Buffer | None = room.begin(path) if room.limit else None
        self.file: FileIO | None = None

    def write(self, content: memoryview) -> None:
        if self.kept is not None:
            if self.room.append(self.kept, content):
                return
            self._write_to_file(self.kept.view)
            self.kept = None
            self.room.remove(self.path)
        self._write_to_file(content)

    def finish(self, durable: bool) -> None:
        """Nothing more comes."""
        if self.kept is not None:
            return
        file = self._opened()
        file.truncate()
        if durable:
            os.fsync(file.fileno())

    def _write_to_file(self, content: memoryview) -> None:
        file, n_written = self._opened(), 0
        while n_written < len(content):
            n_written += file.write(content[n_written:])
        self.room.on_disk += n_written

    def _opened(self) -> FileIO:
        if self.file is None:
            self.file = self.stack.enter_context(files.reuse(self.path))
        return self.file


def _from_memory(kept: Buffer, path: Path) -> Callable[[memoryview, int | None], None]:
    """See `ActivationFile._reader`."""
    position = 0

    def read(target: memoryview, offset: int | None) -> None:
        nonlocal position
        start = position if offset is None else offset
        position = start + len(target)
        if position > kept.size:
            _truncated(path)
        target[:] = kept.view[start:position]

    return read


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
