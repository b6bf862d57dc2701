"""Documents of local text files. Rows of JSON are parsed by Python's own parser, which refuses what
is nested too deep; faster ones overflow the stack of the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.storage.boundary import check_regular, reading

MAX_LINE_BYTES = 256 << 20
_REMEDY = "give a .txt, .jsonl or .parquet file with text"


def read_documents(path: Path) -> list[str]:
    """The documents of a file by its suffix: the whole of a text file, or the column `text` of a
    .jsonl, .json or .parquet file. Raises `LlmqError` that names the file for what cannot be read
    so."""
    check_regular(path)
    read = READERS.get(path.suffix)
    if read is None:
        return [_whole(path)]
    with reading(path, f"not readable as {path.suffix}", _REMEDY):
        return texts(read(path), str(path))


def texts(rows: Iterable[dict[str, Any]], where: str) -> list[str]:
    """The column `text` of rows. Raises `LlmqError` for a row without it, or where it is no text
    that can be stored as UTF-8."""
    found = []
    for number, row in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise LlmqError(
                f"{where}: expected a column 'text' with strings, found columns {columns} in row "
                f"{number}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LlmqError(
                f"{where}: row {number} holds half of a surrogate pair at character {error.start}, "
                "which is no text; repair or leave out this row"
            ) from None
        found.append(text)
    return found


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


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
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


def _json(path: Path) -> Iterable[dict[str, Any]]:
    """A list of rows, or one row per line."""
    with path.open("rb") as file:
        start = file.read(1024).decode("utf-8-sig", "replace").lstrip()[:1]
    if start != "[":
        return _json_lines(path)
    rows: list[dict[str, Any]] = json.loads(path.read_bytes())
    return rows


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if "text" not in names:
            yield dict.fromkeys(names)
            return
        for batch in file.iter_batches(columns=["text"]):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
