"""Rows of local text files. Rows of JSON are parsed by Python's own parser, which refuses what is
nested too deep; faster ones overflow the stack of the process."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmq.errors import LlmqError
from llmq.storage.boundary import check_regular, reading
from llmq.text.rows import Documents, layout_of

MAX_LINE_BYTES = 256 << 20
MAX_LIST_BYTES = 4 << 30  # of a .json file that is one list, unpacked
TEXT_SUFFIXES = (".txt", ".md")
_REMEDY = "give a .txt, .md, .jsonl or .parquet file with text"


def kind_of(path: Path) -> str:
    """The suffix by which a file is read: `.jsonl.gz` of `rows.jsonl.gz`, `.txt` of `a.txt`."""
    suffixes = path.suffixes[-2:]
    return "".join(suffixes) if path.suffix == ".gz" else path.suffix


def add_file(documents: Documents, path: Path) -> None:
    """Collect the documents of a file by its suffix: the rows of a .jsonl, .json (both also .gz) or
    .parquet file, or the whole of any other. Raises `LlmqError` that names the file for what cannot
    be read so."""
    check_regular(path)
    read = READERS.get(kind_of(path))
    if read is None:
        documents.add_text(_whole(path))
        return
    with reading(path, f"not readable as {kind_of(path)}", _REMEDY):
        documents.add(read(path, documents.column), str(path), path.parent)


def _whole(path: Path) -> str:
    with reading(path, "no text that can be read", _REMEDY):
        data = path.read_bytes()
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise LlmqError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or give a .jsonl or "
            ".parquet file"
        ) from None


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _json_lines(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"line {number} is longer than {MAX_LINE_BYTES} bytes")
            row = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if row:
                yield _parsed(row, number)


def _parsed(row: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(row)
    except RecursionError:
        raise ValueError(f"line {number} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"line {number}: expected an object, got {type(value).__name__}")
    return value


def _json(path: Path, column: str | None = None) -> Iterable[dict[str, Any]]:
    """A list of rows, or one row per line."""
    with _opened(path) as file:
        start = file.read(1024).decode("utf-8-sig", "replace").lstrip()[:1]
    if start != "[":
        return _json_lines(path)
    with _opened(path) as file:
        data = file.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        raise ValueError(f"one list of more than {MAX_LIST_BYTES} bytes; put one row on each line")
    rows: list[dict[str, Any]] = json.loads(data)
    return rows


def _parquet(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        layout = layout_of(names, column)
        if layout is None:
            yield dict.fromkeys(names)
            return
        for batch in file.iter_batches(columns=layout.read):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path, str | None], Iterable[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json,
    ".json.gz": _json,
    ".parquet": _parquet,
}
