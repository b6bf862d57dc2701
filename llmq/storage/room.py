"""Memory that hidden states may lie in, in the place of files.

The system keeps in its page cache what it can of files that are written anyway, so this pays where
somebody says how much memory there is (`--max-ram`): nothing has to reach the disk then, and no
write waits for it. Numbers and order are those of the files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Buffer:
    """What a file would hold. data: at least `size` bytes, of which the others are left over."""

    data: bytearray = field(default_factory=bytearray)
    size: int = 0

    @property
    def view(self) -> memoryview:
        return memoryview(self.data)[: self.size]


@dataclass
class Room:
    """limit: bytes of all buffers together. peak: the most that they took. on_disk: bytes that were
    written to files, for want of room here."""

    limit: int = 0
    peak: int = 0
    on_disk: int = 0
    _buffers: dict[Path, Buffer] = field(default_factory=dict)

    def of(self, path: Path) -> Buffer | None:
        """The buffer in the place of a file, None where there is none."""
        return self._buffers.get(path)

    def begin(self, path: Path) -> Buffer:
        """An empty buffer, in the memory that was left over under this name."""
        buffer = self._buffers.setdefault(path, Buffer())
        buffer.size = 0
        return buffer

    def append(self, buffer: Buffer, content: memoryview) -> bool:
        """Put bytes behind the others. False where they do not fit: nothing has changed then."""
        end = buffer.size + len(content)
        n_taken = self.taken + max(0, end - len(buffer.data))
        if n_taken > self.limit:
            return False
        buffer.data[buffer.size : end] = content
        buffer.size = end
        self.peak = max(self.peak, n_taken)
        return True

    def rename(self, path: Path, to: Path) -> bool:
        """Have a buffer take the place of another one. False where there is none."""
        if path not in self._buffers:
            return False
        self._buffers[to] = self._buffers.pop(path)
        return True

    def remove(self, path: Path) -> None:
        """Give a buffer up, where there is one."""
        self._buffers.pop(path, None)

    def clear(self) -> None:
        """Give all of them up."""
        self._buffers.clear()

    @property
    def taken(self) -> int:
        """Bytes of all buffers now, with what is left over in them."""
        return sum(len(buffer.data) for buffer in self._buffers.values())
