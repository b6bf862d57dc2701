"""Where files of others come in. What a library makes of a damaged or hostile file can be any
exception, a panic of its Rust code included; here it becomes one `LlmqError` that names the
file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from llmq.errors import LlmqError, LostProcessError
from llmq.messages import brief

_PASSED_ON = (KeyboardInterrupt, SystemExit, GeneratorExit, LlmqError)
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "can't start new thread",
)
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


@contextmanager
def reading(where: object, problem: str, remedy: str) -> Iterator[None]:
    """Turn whatever is raised inside into `LlmqError`: "WHERE: PROBLEM (what it was); REMEDY".
    Errors of llmq and requests to stop pass."""
    try:
        yield
    except _PASSED_ON:
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        if reason := out_of_memory(error):
            raise LlmqError(f"{where}: {reason}") from error
        raise LlmqError(f"{where}: {problem} ({brief(error)}); {remedy}") from error


@contextmanager
def running(where: object) -> Iterator[None]:
    """Turn what a model raises while it runs into `LlmqError`: a config can pass every check and
    still describe a model that cannot be computed. Want of memory passes, for it says nothing about
    the model."""
    try:
        yield
    except (*_PASSED_ON, OSError, Warning):
        raise
    except BaseException as error:
        if out_of_memory(error) or is_defect_of_settings(error):
            raise
        if is_lost_process(error):
            raise LostProcessError(
                f"another process of this run is gone ({brief(error)}); what it said itself tells "
                "why; then give the same command again"
            ) from error
        raise LlmqError(
            f"{where}: the model cannot be run ({brief(error)}); compare config.json and "
            "generation_config.json with those of the original model"
        ) from error


def is_defect_of_settings(error: BaseException) -> bool:
    """Whether the kernels refuse an environment variable, which has a message of its own."""
    return type(error).__name__ == "SettingError"


def is_lost_process(error: BaseException) -> bool:
    """Whether torch.distributed tells that one of the others no longer answers."""
    return type(error).__name__.startswith("Dist") or any(
        part in str(error).lower() for part in ("gloo", "nccl", "connection closed by peer")
    )


def out_of_memory(error: BaseException) -> str | None:
    """What to tell of an error that means that memory ran out; None for any other."""
    text = str(error)
    told = any(part in text.lower() for part in _OUT_OF_MEMORY)  # by torch, safetensors or CUDA
    is_errno = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (told or is_errno or isinstance(error, MemoryError)):
        return None
    said = f" ({brief(error)})" if text else ""
    return (
        f"out of memory{said}; free some, or give less to do at a time: fewer --samples, a "
        "shorter --sequence-length, a smaller model"
    )


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise `LlmqError` for what is there and is no file, before anybody opens it: a pipe waits for
    a writer for ever, and a device has no end."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # whoever opens it says why it cannot be
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise LlmqError(
                f"{os.fspath(path)}: expected a regular file, found {name}; put the file itself "
                "there"
            )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise `LlmqError` for pipes, sockets and devices in a folder whose files libraries open by
    themselves. Folders in it are nobody's concern."""
    with reading(folder, "not a folder that can be listed", "check its permissions"):
        entries = sorted(os.listdir(folder))
    for name in entries:
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            check_regular(path)
