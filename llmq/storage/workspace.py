"""What is kept of an unfinished run, and what "continue" means.

A `Workspace` is a folder beside an output. It knows what is being made (a run continues only what
it would have made itself), is held by one process, and holds nothing that is used unchecked:
every finished part has a recorded hash, and what does not have it any more is made again. Links
in it are removed, never followed; a folder of its name that llmq did not make is left alone.

    .OUT.llmq-partial/
        state.json            what is being made, from what
        lock                  held while a run works on it
        inputs-*.bin, .seal   the inputs of the next block
        blocks/00003.json     of a finished block: its report and the hash of its shard
        checkpoint/           the folder that will be renamed to OUT; one shard per block, under its
                              final name

A block is finished when its shard has its name: the shard is renamed last, after inputs and record
are durable. Nothing in `checkpoint/` can be loaded before the config is written, at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmq.errors import LlmqError, LlmqWarning, VerificationError
from llmq.storage import files, seals

LOCK = "lock"
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
            parts = ", ".join(_differences(stored, identity))
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


class PartialCheckpoint(Workspace):
    """A checkpoint that grows block by block and survives being killed.

    out_dir: where the finished folder goes. n_shards: shards of the finished checkpoint."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], n_shards: int) -> None:
        # beside what a link points to, so that renaming never crosses file systems
        self.out_dir = files.real_path(out_dir)
        work_dir = work_dir_of(self.out_dir)
        self.checkpoint_dir = work_dir / "checkpoint"
        self.blocks_dir = work_dir / "blocks"
        self.n_shards = n_shards
        super().__init__(work_dir, identity, _STATE)
        try:
            self._check_finished()
        except BaseException:
            self.close()
            raise

    def _open(self, identity: dict[str, Any]) -> None:
        super()._open(identity)
        for folder in (self.checkpoint_dir, self.blocks_dir):
            if not files.is_plain_folder(folder):
                files.remove(folder)
                folder.mkdir()
        files.sync_folder(self.work_dir)

    def _is_whole(self) -> bool:
        # not when killed before the first or after the last step
        return files.is_plain_folder(self.checkpoint_dir)

    def _check_finished(self) -> None:
        """Find out which blocks are finished, and which of them are as they were then. damaged:
        those before the last one that is; redone: all that were finished and have to be again."""
        n_blocks = self.n_shards - 1
        sound = [self._is_sound(index) for index in range(n_blocks)]
        self.n_finished = max((index + 1 for index in range(n_blocks) if sound[index]), default=0)
        self.damaged = [index for index in range(self.n_finished) if not sound[index]]
        self.redone = []
        for index in range(n_blocks):
            if not sound[index] and os.path.lexists(self.shard_path(index)):
                kept = f", the other {sum(sound)} finished ones are kept" if any(sound) else ""
                tell(
                    f"{self.shard_path(index)}: it or its record is not as it was when block "
                    f"{index} was finished; that block is done again{kept}"
                )
                files.remove(self.shard_path(index))
                self.redone.append(index)
            elif index in self.damaged:
                self.redone.append(index)
                tell(f"{self.shard_path(index)}: is missing; block {index} is done again")

    def _is_sound(self, index: int) -> bool:
        try:
            record = self._record(index)
        except files.DamagedError:
            return False
        return seals.matches(self.shard_path(index), record.get("shard"))

    def _record(self, index: int) -> dict[str, Any]:
        record = seals.read_sealed(self.blocks_dir / f"{index:05d}.json")
        return record if isinstance(record, dict) else {}

    def forget_after(self, index: int) -> None:
        """Blocks behind this one are not finished any more: it came out otherwise than before."""
        for later in range(index + 1, self.n_shards):
            files.remove(self.shard_path(later))
        files.sync_folder(self.checkpoint_dir)

    def shard_path(self, index: int) -> Path:
        return self.checkpoint_dir / f"model-{index + 1:05d}-of-{self.n_shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write a shard under a temporary name and return what was written, read back from the
        file. Raises `VerificationError` when a bit of it differs."""
        return dict(self.written(index, tensors))

    def written(self, index: int, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`write_shard` tensor by tensor, for shards of which two copies at a time would be too
        much: embeddings and head of a large vocabulary."""
        path = self.shard_path(index).with_suffix(".tmp")
        files.write_tensors(path, tensors)
        with safe_open(path, framework="pt") as shard:
            stored = set(shard.keys())
        for name in sorted(tensors.keys() | stored):
            tensor = _read(path, name) if name in stored else None
            if tensor is None or name not in tensors or not _same_bits(tensors[name], tensor):
                raise VerificationError(
                    f"{path.name}: tensor {name} read back differs from the one written; the disk "
                    "or the memory is faulty"
                )
            yield name, tensor

    def finish_shard(
        self, index: int, report: dict[str, Any] | None = None, source: dict[str, Any] | None = None
    ) -> None:
        """Record the hash of a shard that was written, and give it its name: from here on it is
        part of the result. source: what tells the weights that it was made of."""
        path = self.shard_path(index)
        partial = path.with_suffix(".tmp")
        seals.write_sealed(
            self.blocks_dir / f"{index:05d}.json",
            {"report": report, "source": source, "shard": files.digest(partial)},
        )
        partial.replace(path)
        files.sync_folder(self.checkpoint_dir)

    def sources(self) -> list[dict[str, Any]]:
        """What the finished blocks were made of."""
        indices = range(self.n_shards - 1)
        finished = [index for index in indices if files.is_plain_file(self.shard_path(index))]
        return [source for index in finished if (source := self._record(index)["source"])]

    def forget_all(self, reason: str) -> None:
        """No block is finished any more."""
        tell(f"{self.work_dir}: {reason}; starting over")
        self.forget_after(-1)
        self.n_finished, self.damaged, self.redone = 0, [], []

    def read_shard(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""
        path = self.shard_path(index)
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
        return {name: _read(path, name) for name in names}

    def block_reports(self) -> list[dict[str, Any]]:
        """The reports of all finished blocks, those of earlier runs included."""
        return [self._record(index)["report"] for index in range(self.n_shards - 1)]

    def keep_only_shards(self) -> None:
        """Remove whatever else lies in the checkpoint: of killed writes, or planted."""
        shards = {self.shard_path(index).name for index in range(self.n_shards)}
        for path in self.checkpoint_dir.iterdir():
            if path.name not in shards:
                files.remove(path)

    def publish(self) -> None:
        """Complete the folder with the manifest and rename it to its place. Raises `DamagedError`
        when a shard is not the one that was verified."""
        digests = {
            self.shard_path(index).name: self._record(index)["shard"]
            for index in range(self.n_shards)
        }
        files.write_manifest(self.checkpoint_dir, digests)
        files.publish(self.checkpoint_dir, self.out_dir)
        self.remove()


_STATE = "state.json"


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
            remove_leftover(work_dir, _STATE, lambda: not os.path.lexists(work_dir / "checkpoint"))
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


def _differences(there: Any, now: Any, name: str = "") -> list[str]:
    """The parts of two identities that differ, with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(there.keys() | now.keys())
            for line in _differences(there.get(key), now.get(key), key)
        ]
    return [] if there == now else [f"{name}: {there} there, {now} now"]


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file that is open no longer than that: mapped pages count as resident
    memory."""
    with safe_open(path, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name).clone()
    return tensor


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes: NaN equals itself, and 0.0 is not -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    # Strides of dimensions of size 1 are arbitrary in a contiguous tensor, which `view` does not
    # take.
    return tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
