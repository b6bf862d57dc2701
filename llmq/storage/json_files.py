"""JSON files of others, read within bounds: of size, of depth, and of what they may be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.storage.boundary import check_regular, reading

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
AGAIN = "download it again"


def read_object(
    path: str | os.PathLike[str],
    what: str,
    remedy: str = AGAIN,
    *,
    max_bytes: int = MAX_BYTES,
    unique_keys: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file. what: what the file should be, such as "a model config".

    Raises `LlmqError` that names the file for anything but a regular file of at most `max_bytes`
    with one object, nested at most `MAX_DEPTH` deep. unique_keys: refuse an object that has a key
    twice, where readers would disagree on what it says."""
    data = read_value(path, what, remedy, max_bytes=max_bytes, unique_keys=unique_keys)
    if not isinstance(data, dict):
        raise LlmqError(
            f"{os.fspath(path)}: not {what}: expected a JSON object, got {_name(data)}; {remedy}"
        )
    return data


def read_value(
    path: str | os.PathLike[str],
    what: str,
    remedy: str = AGAIN,
    *,
    max_bytes: int = MAX_BYTES,
    unique_keys: bool = False,
) -> Any:
    """The JSON value in a file, of any type; else as `read_object`."""
    data = read_bytes(path, what, remedy, max_bytes)
    with reading(os.fspath(path), f"not {what}: no JSON", remedy):
        value = json.loads(data, object_pairs_hook=_unique if unique_keys else None)
        check_depth(value)
    return value


def read_bytes(
    path: str | os.PathLike[str], what: str, remedy: str = AGAIN, max_bytes: int = MAX_BYTES
) -> bytes:
    """The bytes of a regular file of at most `max_bytes`."""
    check_regular(path)
    with reading(os.fspath(path), f"not {what} that can be read", remedy):
        n_bytes = os.stat(path).st_size
        if n_bytes > max_bytes:
            raise ValueError(f"{n_bytes} bytes, expected at most {max_bytes}")
        return Path(path).read_bytes()


def check_depth(value: Any, limit: int = MAX_DEPTH) -> None:
    """Raise `ValueError` for containers nested deeper than `limit`: printing, copying or comparing
    them would end in a RecursionError somewhere else."""
    level = [value]
    for _ in range(limit + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError(f"nested more than {limit} deep")


def _children(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inner if isinstance(child, dict | list)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return made


def _name(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(
        type(value), type(value).__name__
    )
