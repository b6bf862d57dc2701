"""What is used again later has its hash recorded when it is finished, and is checked against it
before it is used: a file by a seal beside it, JSON by a hash that it carries itself.

A seal says that a file is as it was, not who made it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmq.storage import files
from llmq.storage.files import DamagedError

SUFFIX = ".seal"


def write_sealed(path: Path, content: Any) -> None:
    """Write JSON-able content with its hash, durably."""
    content = json.loads(json.dumps(content))
    files.write_json(path, {"content": content, "sha256": files.hash_of_json(content)})


def read_sealed(path: Path) -> Any:
    """The content that `write_sealed` wrote. Raises `DamagedError` when it is not there as it
    was."""
    if not files.is_plain_file(path):
        raise DamagedError(f"{path}: is missing, or is no regular file")
    try:
        data = json.loads(path.read_bytes())
        content, recorded = data["content"], data["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(f"{path}: is not what llmq wrote there") from None
    if files.hash_of_json(content) != recorded:
        raise DamagedError(f"{path}: differs from the hash that it was written with")
    return content


def seal_path(path: Path) -> Path:
    """Where the seal of a file lies."""
    return path.with_name(path.name + SUFFIX)


def seal(path: Path, digest: dict[str, Any] | None = None) -> None:
    """Record the hash of a finished, durable file. digest: of its bytes where that is known."""
    write_sealed(seal_path(path), digest or files.digest(path))


def recorded(path: Path) -> dict[str, Any] | None:
    """The digest that a file was sealed with, or None when there is none that can be read."""
    try:
        found: dict[str, Any] = read_sealed(seal_path(path))
    except DamagedError:
        return None
    return found


def is_sound(path: Path) -> bool:
    """Whether a file is there as it was sealed."""
    expected = recorded(path)
    return expected is not None and matches(path, expected)


def matches(path: Path, expected: Any) -> bool:
    """Whether a file is a regular one with a digest."""
    try:
        size = path.lstat().st_size
        if not files.is_plain_file(path) or size != expected["bytes"]:
            return False
        return files.digest(path) == expected
    except (OSError, KeyError, TypeError):
        return False


def seal_folder(folder: Path, name: str) -> None:
    """Make a folder of files durable and record their hashes in a file of it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            files.sync_folder(path)
        elif path.name != name:
            files.sync(path)
            digests[path.relative_to(folder).as_posix()] = files.digest(path)
    files.sync_folder(folder)
    write_sealed(folder / name, digests)
    files.sync_folder(folder.parent)


def folder_is_sound(folder: Path, name: str) -> bool:
    """Whether every file of a folder is there as it was when the folder was sealed."""
    try:
        digests = read_sealed(folder / name)
    except DamagedError:
        return False
    return all(_is_inside(part) and matches(folder / part, digests[part]) for part in digests)


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def links_in(folder: Path) -> Iterable[Path]:
    """Everything below a folder that is neither a regular file nor a folder: llmq makes none."""
    for path in sorted(folder.iterdir()):
        if files.is_plain_folder(path):
            yield from links_in(path)
        elif not files.is_plain_file(path):
            yield path
