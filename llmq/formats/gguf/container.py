"""A GGUF file, read within its bounds (github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    "GGUF", version, number of tensors, number of fields
    fields       key, type, value
    tensors      name, dimensions (the innermost first), type, place
    data         each tensor at a multiple of the alignment

Nothing in the file is believed: every length is held against the bytes that are left before
anything is read or reserved for it, and whatever is wrong is a `LlmqError` that names the file."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq.formats.gguf.tensor_types import BY_NUMBER, GgmlType
from llmq.storage.boundary import check_regular, reading

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 64
MAX_ALIGNMENT = 1 << 20
REMEDY = "download it again"

STRING, ARRAY = 8, 9
# struct's letters of the types of single values.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FEWEST_BYTES = {STRING: 8, **{kind: struct.calcsize(code) for kind, code in SCALARS.items()}}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. shape: the outermost dimension first, as torch has it. start: of its
    bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    start: int

    @property
    def n_bytes(self) -> int:
        return self.type.size(self.shape)


class GgufFile:
    """fields: what the file says of the model, by key. tensors: by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        with reading(path, "not a GGUF file that can be read", REMEDY), open(path, "rb") as file:
            cursor = _Cursor(file, os.fstat(file.fileno()).st_size)
            n_tensors = cursor.begin()
            self.fields = cursor.fields()
            alignment = _alignment(self.fields)
            self.tensors = cursor.tensors(n_tensors, alignment)

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8."""
        tensor = self.tensors[name]
        with (
            reading(self.path, f"tensor {name} cannot be read", REMEDY),
            open(self.path, "rb") as file,
        ):
            file.seek(tensor.start)
            content = bytearray(tensor.n_bytes)
            if file.readinto(content) != tensor.n_bytes:
                raise ValueError("the file ends before")
        return torch.frombuffer(content, dtype=torch.uint8)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While its fields are asked for what they may lack, or hold as something else."""
        with reading(self.path, "does not describe a model that llmq reads", REMEDY):
            yield


class _Cursor:
    """Reads forward, never past the end."""

    def __init__(self, file: BufferedReader, n_bytes: int) -> None:
        self.file, self.left, self.n_bytes = file, n_bytes, n_bytes

    def take(self, n_bytes: int) -> bytes:
        self.need(n_bytes)
        content = self.file.read(n_bytes)
        if len(content) != n_bytes:
            raise ValueError("the file ends before its header does")
        self.left -= n_bytes
        return content

    def need(self, n_bytes: int) -> None:
        if n_bytes > self.left:
            raise ValueError(f"needs {n_bytes} bytes more, and {self.left} are left")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, most: int | None = None) -> str:
        length = self.number("Q")
        if most is not None and length > most:
            raise ValueError(f"a name of {length} bytes, expected at most {most}")
        return self.take(length).decode("utf-8")

    def begin(self) -> int:
        """Read up to the fields. Returns the number of tensors."""
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, expected 2 or 3 of the little-endian form")
        n_tensors, self.n_fields = self.number("Q"), self.number("Q")
        self.need(24 * n_tensors + 13 * self.n_fields)
        return int(n_tensors)

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(self.n_fields):
            key = self.text(MAX_KEY_BYTES)
            if key in found:
                raise ValueError(f"field {key} appears twice")
            kind = self.number("I")
            found[key] = self.array(key) if kind == ARRAY else self.value(key, kind)
        return found

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in SCALARS:
            raise ValueError(f"field {key} is of the unknown type {kind}")
        return self.number(SCALARS[kind])

    def array(self, key: str) -> list[Any]:
        kind, length = self.number("I"), self.number("Q")
        if kind not in _FEWEST_BYTES:
            raise ValueError(f"field {key} is an array of the unknown type {kind}")
        self.need(length * _FEWEST_BYTES[kind])
        if kind == STRING:
            return [self.text() for _ in range(length)]
        code = SCALARS[kind]
        content = self.take(length * struct.calcsize(code))
        return list(np.frombuffer(content, np.dtype(code).newbyteorder("<")).tolist())

    def tensors(self, number: int, alignment: int) -> dict[str, StoredTensor]:
        entries = [self.entry() for _ in range(number)]
        position = self.n_bytes - self.left
        data = -(-position // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, shape, kind, place in entries:
            tensor = StoredTensor(name, shape, kind, data + place)
            if name in found:
                raise ValueError(f"tensor {name} appears twice")
            if place % alignment or tensor.start + tensor.n_bytes > self.n_bytes:
                raise ValueError(f"tensor {name} does not lie in the file")
            found[name] = tensor
        return found

    def entry(self) -> tuple[str, tuple[int, ...], GgmlType, int]:
        name = self.text(MAX_NAME_BYTES)
        n_dimensions = self.number("I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {n_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))[::-1]
        number, place = self.number("I"), self.number("Q")
        kind = BY_NUMBER.get(number)
        if kind is None:
            raise ValueError(f"tensor {name} is of the unknown type {number}")
        if not prod(shape) or shape[-1] % kind.block:
            raise ValueError(f"tensor {name} of shape {list(shape)} cannot be of type {kind.name}")
        return name, shape, kind, int(place)


def _alignment(fields: dict[str, Any]) -> int:
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
        raise ValueError(f"general.alignment is {alignment!r}, expected a multiple of 8")
    return alignment
