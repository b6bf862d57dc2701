"""Tensors of several safetensors files streamed into one, and how files are shared out.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: dtype,
shape and place of each tensor), and the data without gaps (github.com/huggingface/safetensors).
The bytes of a tensor are copied as they are, a few megabytes at a time; the hash of the new file
and those of the tensors are taken on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

from llmq.storage import files
from llmq.storage.files import DamagedError

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 4 << 20
_ALIGNMENT = 8  # of the data, by a header that is padded with spaces


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: start: of its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    @property
    def element_bytes(self) -> int:
        """Bytes of a number; 1 for tensors without any."""
        return max(1, self.n_bytes // max(1, prod(self.shape)))

    @property
    def kind(self) -> bytes:
        """Dtype and shape, for hashes."""
        return f"{self.dtype} {list(self.shape)}\n".encode()


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file that llmq wrote, in the order of their bytes. Raises
    `DamagedError` for anything else."""
    try:
        with _open(path) as file:
            length = int.from_bytes(_read(file, 8), "little")
            if length > path.lstat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(_read(file, length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                place = (8 + length + start, end - start)
                found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{path}: is missing, or not the file that llmq wrote there") from None
    return dict(sorted(found.items(), key=lambda each: each[1].start))


def digests(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The digest of a safetensors file, and the sha256 of each of its tensors (dtype and shape
    included), in one pass. Raises as `stored_tensors`."""
    whole, tensors = hashlib.sha256(), stored_tensors(path)
    hashes = {}
    with _open(path) as file:
        first = next(iter(tensors.values())).start if tensors else path.stat().st_size
        whole.update(_read(file, first))
        for name, tensor in tensors.items():
            own = hashlib.sha256(tensor.kind)
            for chunk in _chunks(file, tensor.n_bytes):
                whole.update(chunk)
                own.update(chunk)
            hashes[name] = own.hexdigest()
        return {"sha256": whole.hexdigest(), "bytes": file.tell()}, hashes


def hashes_of(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The sha256 of each tensor, as `digests` gives it, wherever it lies. Raises `DamagedError`
    where one cannot be read."""
    hashes = {}
    for name, tensor in tensors.items():
        own = hashlib.sha256(tensor.kind)
        for chunk in _data(tensor):
            own.update(chunk)
        hashes[name] = own.hexdigest()
    return hashes


def content_hash(tensor: StoredTensor) -> str:
    """The sha256 of the bytes of a tensor alone."""
    sha256 = hashlib.sha256()
    for chunk in _data(tensor):
        sha256.update(chunk)
    return sha256.hexdigest()


def group_by_size(sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Which files go into which shard: neighbours, as many as `max_bytes` hold. One that is larger
    has a shard of its own."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(index)
        room -= size
    return groups


def shard_names(n: int) -> list[str]:
    """What the shards of a checkpoint are called."""
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def merge(
    path: Path, tensors: Mapping[str, StoredTensor], expected: Mapping[str, str]
) -> dict[str, Any]:
    """Write a durable safetensors file of tensors that lie in others, and return its digest.

    expected: the sha256 of each tensor. Raises `DamagedError` where one is another by now, and
    `OSError` when the disk is full."""
    # Wider numbers first, so that every tensor is aligned although there are no gaps.
    ordered = dict(sorted(tensors.items(), key=lambda each: -each[1].element_bytes))
    sha256 = hashlib.sha256()
    with files.create(path) as target:
        header = _header(ordered)
        _write(target, header)
        sha256.update(header)
        for name, tensor in ordered.items():
            own = hashlib.sha256(tensor.kind)
            for chunk in _data(tensor):
                _write(target, chunk)
                sha256.update(chunk)
                own.update(chunk)
            if own.hexdigest() != expected.get(name):
                raise DamagedError(
                    f"{tensor.path}: changed after it was written and checked (tensor {name}); the "
                    "disk or the memory is faulty, repeat the command to do this part again"
                )
        os.fsync(target.fileno())
        return {"sha256": sha256.hexdigest(), "bytes": target.tell()}


def _header(tensors: Mapping[str, StoredTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.n_bytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _data(tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time. Raises `DamagedError` where they cannot be read."""
    try:
        with _open(tensor.path) as file:
            file.seek(tensor.start)
            yield from _chunks(file, tensor.n_bytes)
    except FileNotFoundError:
        raise DamagedError(
            f"{tensor.path}: is gone; repeat the command to do this part again"
        ) from None


def _open(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))


def _chunks(file: FileIO, n_bytes: int) -> Iterator[bytes]:
    """The next bytes of a file; fewer where it ends before."""
    while n_bytes > 0:
        chunk = file.read(min(CHUNK_BYTES, n_bytes))
        if not chunk:
            return
        n_bytes -= len(chunk)
        yield chunk


def _read(file: FileIO, n_bytes: int) -> bytes:
    return b"".join(_chunks(file, n_bytes))


def _write(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
