"""What is kept of an unfinished run, and what "continue" means.

A `Workspace` is a folder beside an output. It knows what is being made (a run continues only what
it would have made itself), is held by one process, and holds nothing that is used unchecked:
every finished part has a recorded hash, and what does not have it any more is made again. Links
in it are removed, never followed; a folder of its name that llmq did not make is left alone.
What lies in that of a checkpoint stands in `llmq.storage.partial_checkpoint`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, LlmqWarning
from llmq.storage import files, seals

LOCK = "lock"
STATE = "state.json"  # of a checkpoint
PUBLISHING = "publishing.json"  # written when an output is about to take its place


class Workspace:
    """The folder of an unfinished run. identity: everything that decides the result, JSON-able.
    state: the file that holds it.

    Raises `LlmqError` when the folder belongs to a run of another identity, to a running process,
    or not to llmq."""

    def __init__(self, work_dir: Path, identity: dict[str, Any], state: str) -> None:
        self.work_dir = work_dir
        self._state_path = work_dir / state
        self._made = files.make_folder(work_dir.parent)
        self._enter()
        try:
            self._open(json.loads(json.dumps(identity)))
        except BaseException:
            self._lock.close()
            raise

    def _enter(self) -> None:
        """Make the folder or find it, and lock it."""
        while True:
            if not os.path.lexists(self.work_dir):
                with contextlib.suppress(FileExistsError):
                    self.work_dir.mkdir()
                    self._made.insert(0, self.work_dir)
                    files.sync_folder(self.work_dir.parent)
            check_own(self.work_dir, self._state_path.name)
            self._lock = _open_lock(self.work_dir / LOCK)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise LlmqError(
                    f"{self.work_dir}: another llmq is working on this output; wait for it or "
                    "choose another output"
                ) from None
            if _is_same_file(self._lock, self.work_dir / LOCK):
                return
            self._lock.close()  # of a run that ended meanwhile and took it away

    def _open(self, identity: dict[str, Any]) -> None:
        for path in list(seals.links_in(self.work_dir)):
            tell(
                f"{path}: is a link or a special file, which llmq does not make; removed, not "
                "followed"
            )
            files.remove(path)
        if os.path.lexists(self._state_path):
            try:
                stored = seals.read_sealed(self._state_path)
            except files.DamagedError as error:
                self._start_over(str(error))
            else:
                self.check_same(stored, identity)
        elif set(os.listdir(self.work_dir)) - {LOCK, self._state_path.name + ".tmp"}:
            self._start_over(f"{self._state_path}: is missing")
        if os.path.lexists(self._state_path) and not self._is_whole():
            self.clear()
        if not os.path.lexists(self._state_path):
            files.sync_folder(self.work_dir)
            seals.write_sealed(self._state_path, identity)

    def _is_whole(self) -> bool:
        """Whether there is anything to continue."""
        return True

    def check_same(self, stored: Any, identity: dict[str, Any]) -> None:
        """Raise `LlmqError` that says in what the run that is kept here differs."""
        stored = stored if isinstance(stored, dict) else {}
        names = sorted(identity.keys() | stored.keys())
        differing = [name for name in names if identity.get(name) != stored.get(name)]
        if differing:
            parts = ", ".join(differences(stored, identity))
            raise LlmqError(
                f"{self.work_dir}: holds an interrupted run with another {' and '.join(differing)} "
                f"({parts}); repeat its command as it was to finish it, or remove that folder to "
                "start over"
            )

    def _start_over(self, reason: str) -> None:
        tell(f"{reason}: what the interrupted run had made cannot be told any more; starting over")
        self.clear()

    def clear(self) -> None:
        """Remove everything but the lock, what tells of the rest first."""
        files.remove(self._state_path)
        for path in self.work_dir.iterdir():
            if path.name != LOCK:
                files.remove(path)
        files.sync_folder(self.work_dir)

    def remove(self) -> None:
        """Remove the folder: the run is over."""
        _remove_all(self.work_dir)
        self.close()

    def discard(self) -> None:
        """Remove everything, after an error that repeating the command would meet again."""
        with contextlib.suppress(OSError):
            self.remove()
        self.close()
        files.remove_empty(self._made)

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.close()


def tell(message: str) -> None:
    """Say that something was found otherwise than it was left."""
    warnings.warn(message, LlmqWarning, stacklevel=3)


def work_dir_of(out_dir: Path) -> Path:
    """Where the work on an output lies."""
    return out_dir.with_name(f".{out_dir.name}.llmq-partial")


def check_own(work_dir: Path, state: str) -> None:
    """Raise `LlmqError` for something of the name of a work folder that llmq did not make."""
    if not files.is_plain_folder(work_dir):
        reason = "is no folder, or a link to one"
    elif work_dir.lstat().st_uid != os.geteuid():
        reason = "belongs to another user"
    elif not _is_own(work_dir, state):
        reason = f"has neither {state} nor {LOCK}"
    else:
        return
    raise LlmqError(
        f"{work_dir}: llmq keeps unfinished work under this name, and this was not made by it "
        f"({reason}), so it is left alone; move it elsewhere, or choose another output"
    )


def _is_own(work_dir: Path, state: str) -> bool:
    names = set(os.listdir(work_dir))
    return not names or bool(names & {state, state + ".tmp", LOCK})


def remove_leftover(work_dir: Path, state: str, is_over: Callable[[], bool]) -> None:
    """Remove a work folder that llmq made, if nothing in it is needed any more and no run has
    it. is_over: what tells that, beside an empty folder."""
    if not files.is_plain_folder(work_dir) or not _is_own(work_dir, state):
        return
    is_needed = bool(set(os.listdir(work_dir)) - {LOCK}) and not is_over()
    with contextlib.suppress(OSError), _open_lock(work_dir / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_needed:
            _remove_all(work_dir)


def _remove_all(work_dir: Path) -> None:
    """Remove a work folder that is locked: what tells that a run is over goes last, then the lock,
    which makes the folder known as llmq's."""
    for path in sorted(work_dir.iterdir(), key=lambda path: path.name == PUBLISHING):
        if path.name != LOCK:
            files.remove(path)
    files.remove(work_dir / LOCK)
    work_dir.rmdir()


def check_output(out_dir: Path, overwrite: bool) -> None:
    """`files.check_output`, after removing what a run left behind that was killed when its output
    was in place already."""
    resolved = files.real_path(out_dir)
    if (resolved / files.MANIFEST).is_file():
        with contextlib.suppress(OSError):
            work_dir = work_dir_of(resolved)
            remove_leftover(work_dir, STATE, lambda: not os.path.lexists(work_dir / "checkpoint"))
            files.remove_aside(resolved)
    files.check_output(out_dir, overwrite)


def _open_lock(path: Path) -> FileIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if os.path.lexists(path) and not files.is_plain_file(path):
        files.remove(path)
    file = FileIO(os.open(path, flags, 0o666), "r+")
    files.sync_folder(path.parent)
    return file


def _is_same_file(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False


def differences(there: Any, now: Any, name: str = "") -> list[str]:
    """The parts of two identities that differ, with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(there.keys() | now.keys())
            for line in differences(there.get(key), now.get(key), key)
        ]
    return [] if there == now else [f"{name}: {there} there, {now} now"]
