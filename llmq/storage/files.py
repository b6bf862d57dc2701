"""Writing folders so that they are there as a whole or not at all: fsync, rename, manifest.

Nothing here follows a link: files are created exclusively, and what is removed is the name in its
folder, never what a link of that name points to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmq.errors import LlmqError, VerificationError

MANIFEST = "llmq-manifest.json"
# In the folder that an earlier output is moved into while another takes its place.
_ASIDE_MARK = "moved-by-llmq"
_ASIDE_OUTPUT = "output"


class WriteError(LlmqError):
    """A file could not be written, mostly for want of space: what was finished before is worth
    keeping."""


class DamagedError(VerificationError):
    """A file is another than the one that was finished and checked. What was finished beside it is
    worth keeping: the same command does only this part again."""


def unwritable(path: object, reason: object) -> WriteError:
    """The error for a file that cannot be written."""
    return WriteError(
        f"{path}: cannot be written ({reason}); make space on this disk, then repeat the command"
    )


def sync(path: Path) -> None:
    """Make the contents of a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """`sync` for a folder, on file systems that can."""
    with contextlib.suppress(OSError):
        sync(folder)


def is_plain_file(path: Path) -> bool:
    """Whether there is a regular file of this name, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_plain_folder(path: Path) -> bool:
    """Whether there is a folder of this name, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder with all that is in it; nothing
    where nothing is."""
    if is_plain_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def create(path: Path) -> FileIO:
    """A new file of this name to write to, in the place of anything that has the name."""
    remove(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return FileIO(os.open(path, flags, 0o666), "r+")


def reuse(path: Path) -> FileIO:
    """The file of this name to write over, if it is a regular one that has no other name; else a
    new one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return create(path)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return FileIO(descriptor, "r+")
    os.close(descriptor)
    return create(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and make it durable. Raises `WriteError` when the disk is full or
    the file too large."""
    try:
        with create(path) as file:  # what the umask gives; safetensors' own has mode 0600
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
        path.chmod(mode)
        sync(path)
    except (SafetensorError, OSError) as error:
        raise unwritable(path, error) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, make it durable, rename, make the name durable."""
    partial = path.with_name(path.name + ".tmp")
    with create(partial) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add a line to a file, durably."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    is_new = not os.path.lexists(path)
    with FileIO(os.open(path, flags, 0o666), "a") as file:
        file.write(text.encode())
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """`write_bytes` of JSON."""
    write_bytes(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """JSON as `write_json` writes it."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_index(target_dir: Path, shards: Mapping[str, Iterable[str]], total_size: int) -> None:
    """Write `model.safetensors.index.json` for tensor names by shard file."""
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    write_json(
        target_dir / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of files by name: enough to notice that one was replaced."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}


def real_path(path: Path) -> Path:
    """What a path points to. A circle of links, at which `Path.resolve` raises an error that is no
    `OSError`, is left for whoever opens it."""
    return Path(os.path.realpath(path))


def digest(path: Path) -> dict[str, Any]:
    """sha256 and bytes of a regular file. Raises `OSError` for a link or a special file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with FileIO(os.open(path, flags)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        found = hashlib.file_digest(file, "sha256")
        return {"sha256": found.hexdigest(), "bytes": status.st_size}


def digest_of(content: bytes) -> dict[str, Any]:
    """sha256 and bytes of what will be a file."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def hash_of_json(data: Any) -> str:
    """sha256 of data as JSON, however it was laid out."""
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def write_manifest(target_dir: Path, expected: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """The last file: sha256 and size of every other one, and a hash of these. A folder with it was
    written by llmq and is complete.

    expected: digests by name of files that were read back already, durable and as they should be.
    Raises `DamagedError` where one has another size by now."""
    entries = {}
    for path in sorted(target_dir.rglob("*")):
        name = path.relative_to(target_dir).as_posix()
        if path.is_dir():
            sync_folder(path)
        elif name in expected:
            entries[name] = dict(expected[name])
            if path.lstat().st_size != expected[name]["bytes"]:
                raise DamagedError(
                    f"{path}: changed after it was written and checked; the disk or the memory is "
                    "faulty, repeat the command to do this part again"
                )
        elif path.is_file():
            entries[name] = digest(path)
            sync(path)
    write_json(target_dir / MANIFEST, manifest_of(entries))


def manifest_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a manifest. entries: sha256 and bytes by name of file."""
    return {"files": entries, "sha256": hash_of_json(entries)}


def check_output(out_dir: Path, overwrite: bool) -> None:
    """Refuse an output that exists, or that cannot be written. Only folders that llmq wrote can be
    overwritten."""
    if out_dir.exists() or out_dir.is_symlink():
        if not overwrite:
            raise LlmqError(
                f"{out_dir}: exists already; choose another output, or give --overwrite to replace "
                "it"
            )
        if not (out_dir / MANIFEST).is_file():
            raise LlmqError(
                f"{out_dir}: was not written by llmq (it has no {MANIFEST}), so --overwrite leaves "
                "it alone; remove it yourself or choose another output"
            )
        _check_aside(aside_of(real_path(out_dir)))
    parent = out_dir.absolute().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise LlmqError(
            f"{out_dir}: {existing} is not a folder that can be written; choose another output"
        )


def check_space(
    folder: Path,
    n_bytes: int,
    what: str = "output and activations",
    remedy: str = "choose an output elsewhere or give fewer --samples",
) -> None:
    """Refuse to start what will fill the disk of a folder. what: needs the bytes. remedy: beside
    making space."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise LlmqError(
            f"{folder}: {free / 1e9:.2f} GB are free, and {what} need about "
            f"{n_bytes / 1e9:.2f} GB; make space, {remedy}"
        )


def make_folder(folder: Path) -> list[Path]:
    """Create a folder with its parents, durably. Returns those that were not there, innermost
    first, for `remove_empty`."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync_folder(path.parent)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those folders that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def aside_of(out_dir: Path) -> Path:
    """Where an output waits while another takes its place."""
    return out_dir.with_name(f".{out_dir.name}.replaced")


def _check_aside(aside: Path) -> None:
    """Raise `LlmqError` for something of the name that is needed and that llmq did not make."""
    if os.path.lexists(aside) and not _is_aside(aside):
        raise LlmqError(
            f"{aside}: is in the way and was not made by llmq (it has no {_ASIDE_MARK}), so it is "
            "left alone; move it elsewhere, or choose another output"
        )


def _is_aside(aside: Path) -> bool:
    if not is_plain_folder(aside):
        return False
    names = set(os.listdir(aside))
    return _ASIDE_MARK in names or names <= {_ASIDE_MARK + ".tmp"}  # or killed before the mark


def remove_aside(out_dir: Path) -> None:
    """Remove the earlier output that `publish` moved aside; nothing that llmq did not make."""
    aside = aside_of(out_dir)
    if _is_aside(aside):
        remove(aside / _ASIDE_OUTPUT)
        sync_folder(aside)
        shutil.rmtree(aside)  # the mark goes last: until then it is known as llmq's own


def publish(finished_dir: Path, out_dir: Path) -> None:
    """Put a finished folder in its place by renaming; an earlier output is moved aside first and
    removed after. Raises `LlmqError` when something that llmq did not make is in the way."""
    out_dir = real_path(out_dir)  # a link stays, what it points to is replaced
    make_folder(out_dir.parent)
    aside = aside_of(out_dir)
    replaces = out_dir.exists()
    if replaces:
        _check_aside(aside)
        remove_aside(out_dir)
        aside.mkdir()
        write_bytes(aside / _ASIDE_MARK, b"an earlier output, moved here while another took over\n")
        sync_folder(aside.parent)
        out_dir.rename(aside / _ASIDE_OUTPUT)
        sync_folder(aside)
    try:
        finished_dir.replace(out_dir)
    except OSError:
        if replaces:
            (aside / _ASIDE_OUTPUT).rename(out_dir)
            remove_aside(out_dir)
        raise
    sync_folder(out_dir.parent)
    sync_folder(finished_dir.parent)
    remove_aside(out_dir)
