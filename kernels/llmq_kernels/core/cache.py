"""Where what was compiled or measured on this machine is kept, and whether it may be trusted.

Compiled code is executed, so a file counts only if nobody but this user or root can have written
it: every folder on the way belongs to one of them and cannot be written by others (a sticky one
like /tmp can), the last folder and the file in no case, and no link leads to the file. Against
damage, what is kept is sealed with a hash over its key and its bytes: a file that was cut off,
flipped or given another's name is no entry. kernels/README.md has the whole of it."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

SEAL = b"llmq sealed 1\n"
HASH_BYTES = 32
MOST_BYTES = 32 << 20  # that an entry may have; kernels have some tens of kilobytes
MOST_LINKS = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_CHECKS_OWNERS = hasattr(os, "geteuid")  # elsewhere the folders of a user are guarded by the system


class Unsafe(Exception):
    """A file or folder of the cache that must not be used, and why; or that cannot be used."""


def cache_dir() -> Path:
    """`$LLMQ_CACHE_DIR`, else `llmq` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if asked := os.environ.get("LLMQ_CACHE_DIR"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmq"


# --- who can have written it ----------------------------------------------------------------------


def _check_owner(path: Path, status: os.stat_result) -> None:
    if _CHECKS_OWNERS and status.st_uid not in (os.geteuid(), 0):
        raise Unsafe(f"{path} belongs to user {status.st_uid}, not to this user ({os.geteuid()})")


def _check_mode(path: Path, status: os.stat_result) -> None:
    if _CHECKS_OWNERS and status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        raise Unsafe(f"{path} can be written by others (mode {mode:04o}; chmod go-w mends it)")


def _status(path: Path, create: bool) -> os.stat_result:
    try:
        return path.lstat()
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):  # another process was faster
        path.mkdir(mode=0o700)
    return path.lstat()


def private_folder(path: Path, *, create: bool = False) -> Path:
    """`path` without links, once everything on the way to it is known to be safe. create: make what
    is missing, for this user only. Raises `Unsafe`, or `OSError` where it cannot be made or read
    (`FileNotFoundError` where it is missing)."""
    whole = Path(os.path.abspath(path))
    if not _CHECKS_OWNERS:
        if create:
            whole.mkdir(parents=True, exist_ok=True)
        return whole
    place, rest, n_links = Path(whole.anchor), list(whole.parts[1:]), 0
    status = place.lstat()
    while True:
        _check_owner(place, status)
        if not status.st_mode & stat.S_ISVTX:
            _check_mode(place, status)
        if not rest:
            break
        name = rest.pop(0)
        if name == "..":  # in the target of a link; `place` has none any more
            place = place.parent
            status = place.lstat()
            continue
        child = place / name
        status = _status(child, create)
        if stat.S_ISLNK(status.st_mode):
            _check_owner(child, status)
            n_links += 1
            if n_links > MOST_LINKS:
                raise Unsafe(f"{whole} leads through more than {MOST_LINKS} links")
            target = Path(os.readlink(child))
            rest = [part for part in target.parts if part != target.anchor] + rest
            place = Path(target.anchor) if target.anchor else place
            status = place.lstat()
        elif stat.S_ISDIR(status.st_mode):
            place = child
        else:
            raise Unsafe(f"{child} is not a folder")
    _check_mode(place, status)
    return place


def read_private(path: Path) -> bytes:
    """The bytes of a file in a folder that `private_folder` gave. Raises `Unsafe` for what this
    user or root did not write or others can write, for links, and for what is no plain file;
    `FileNotFoundError`."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # never waits for a pipe
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        is_link = error.errno in (errno.ELOOP, errno.EMLINK)
        why = "is a link" if is_link else f"cannot be read ({error.strerror})"
        raise Unsafe(f"{path} {why}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unsafe(f"{path} is not a file")
        _check_owner(path, status)
        _check_mode(path, status)
        if status.st_size > MOST_BYTES:
            raise Unsafe(f"{path} has {status.st_size} bytes, more than {MOST_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MOST_BYTES)
    except OSError as error:
        raise Unsafe(f"{path} cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


# --- whole or not at all --------------------------------------------------------------------------


def write_private(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whoever else writes it and whenever the power
    fails. Raises `OSError`."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
    with suppress(OSError):  # some systems cannot sync folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(len(key).to_bytes(8, "little") + key + content).digest()


def seal(key: bytes, content: bytes) -> bytes:
    """What is kept on disk: a mark, the hash over key and content, the content."""
    return SEAL + _digest(key, content) + content


def unseal(path: Path, key: bytes) -> bytes:
    """The content that was sealed with `key`. Raises what `read_private` does, and `Unsafe` for
    anything else than such content."""
    stored = read_private(path)
    start = len(SEAL) + HASH_BYTES
    content = stored[start:]
    if stored[: len(SEAL)] != SEAL or stored[len(SEAL) : start] != _digest(key, content):
        raise Unsafe(f"{path} is damaged or not what its name says ({len(stored)} bytes)")
    return content
