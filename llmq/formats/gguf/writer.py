"""Writing a GGUF file, one tensor at a time, so that it is there as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from torch import Tensor

from llmq.errors import VerificationError
from llmq.formats.gguf.container import ALIGNMENT, ARRAY, MAGIC, SCALARS, STRING
from llmq.formats.gguf.tensor_types import GgmlType
from llmq.storage import files

VERSION = 3
UINT32, INT32, FLOAT32, BOOL, UINT64 = 4, 5, 6, 7, 10
Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written. shape: the outermost dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def n_bytes(self) -> int:
        return self.type.size(self.shape)


def write_gguf(
    path: Path,
    fields: Mapping[str, Value],
    entries: Sequence[Entry],
    contents: Iterable[Tensor],
) -> int:
    """Write a file under a temporary name beside `path`, read it back, and rename it. contents: the
    bytes (uint8) of each entry, in their order. Returns the size of the file.

    Raises `WriteError` when the disk is full, `VerificationError` where other bytes are read than
    were written."""
    path = files.real_path(path)
    partial = path.with_name(f".{path.name}.llmq-writing")
    made = files.make_folder(path.parent)
    try:
        try:
            written = _write(partial, fields, entries, contents)
            found = files.digest(partial)
        except OSError as error:
            raise files.unwritable(path, error.strerror or error) from None
        if found["sha256"] != written:
            raise VerificationError(
                f"{path}: reads back otherwise than it was written; the disk or the memory is "
                "faulty"
            )
        partial.replace(path)
        files.sync_folder(path.parent)
    finally:
        files.remove(partial)
        files.remove_empty(made)
    return int(found["bytes"])


def _write(
    path: Path,
    fields: Mapping[str, Value],
    entries: Sequence[Entry],
    contents: Iterable[Tensor],
) -> str:
    """Write a durable file. Returns its sha256."""
    sha256 = hashlib.sha256()
    with files.create(path) as file:
        _put(file, header(fields, entries), sha256)
        for entry, content in zip(entries, contents, strict=True):
            data = content.contiguous().view(-1).numpy().data
            if data.nbytes != entry.n_bytes:
                raise AssertionError(f"{entry.name}: {data.nbytes} bytes of {entry.n_bytes}")
            _put(file, data, sha256)
            _put(file, _padding(entry.n_bytes), sha256)
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _put(file: FileIO, content: bytes | memoryview, sha256: hashlib._Hash) -> None:
    sha256.update(content)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def header(fields: Mapping[str, Value], entries: Sequence[Entry]) -> bytes:
    """Everything before the data, which is padded like it."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(fields))]
    parts += [_text(key) + _value(value) for key, value in fields.items()]
    place = 0
    for entry in entries:
        dimensions = entry.shape[::-1]
        parts += [
            _text(entry.name),
            struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions),
            struct.pack("<IQ", entry.type.number, place),
        ]
        place += entry.n_bytes + len(_padding(entry.n_bytes))
    joined = b"".join(parts)
    return joined + _padding(len(joined))


def _padding(n_bytes: int) -> bytes:
    return bytes(-n_bytes % ALIGNMENT)


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(value: Value) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool | int | float):
        kind = _kind(value)
        return struct.pack(f"<I{SCALARS[kind]}", kind, value)
    return struct.pack("<I", ARRAY) + _array(value)


def _array(values: Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]) -> bytes:
    """An array without the type that says so: type of the elements, number, elements."""
    first = values[0] if len(values) else 0
    if isinstance(first, str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(_text(str(v)) for v in values)
    kind = BOOL if isinstance(first, bool) else FLOAT32 if isinstance(first, float) else INT32
    return struct.pack(f"<IQ{len(values)}{SCALARS[kind]}", kind, len(values), *values)


def _kind(value: bool | int | float) -> int:
    """The type of a number: what llama.cpp asks for is uint32 and float32."""
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return FLOAT32
    if value < 0:
        return INT32
    return UINT32 if value < 1 << 32 else UINT64
