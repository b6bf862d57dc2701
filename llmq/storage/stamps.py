"""The files of a source model as they were when a run began, so that none is replaced, edited or
deleted under way without being noticed.

A look at a stamp is one `stat`. The time of the last change of the inode (ctime) is part of it:
unlike that of the contents it cannot be set back. Where nothing else has changed, the contents may
be the same (a link was made, a mode set); what was read decides then, by its hash."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import LlmqError
from llmq.storage import files

# What may decide a result or be copied beside it: an edit of a README or of a log is nobody's
# business.
_SUFFIXES = (".safetensors", ".json", ".model", ".tiktoken", ".jinja", ".py", ".bpe", ".codes")
_NAMES = re.compile(
    r"tokenizer.*|vocab.*|merges.*|.*(licen[sc]e|copying|copyright|notice|use[-_ ]policy).*",
    re.IGNORECASE,
)
_FOLDERS = ("additional_chat_templates",)
_LARGE = 256_000_000  # bytes: a companion file above is told by its stamp alone


class SourceChangedError(LlmqError):
    """A file of the source is not the one it was. may_be_same: of weights of which only the inode
    says so."""

    def __init__(self, message: str, may_be_same: bool) -> None:
        super().__init__(message)
        self.may_be_same = may_be_same


@dataclass(frozen=True)
class Stamp:
    """Size in bytes, times in nanoseconds and number of the inode."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class SourceFiles:
    """The files that a run may use, by name in the folder, as they were when it began."""

    folder: Path
    stamps: dict[str, Stamp]

    @classmethod
    def of(cls, folder: Path) -> SourceFiles:
        """Take the stamps. This comes before anything is read."""
        stamps = {}
        for directory in (folder, *(folder / name for name in _FOLDERS)):
            for path in sorted(directory.iterdir()) if directory.is_dir() else ():
                if path.is_file() and _is_used(path.name):
                    stamps[path.relative_to(folder).as_posix()] = Stamp.of(path)
        return cls(folder, stamps)

    def inodes(self, paths: Iterable[Path]) -> dict[str, list[int]]:
        """Inode and its time of change by name, for files of this folder."""
        found = {path.name: self.stamps[path.name] for path in paths if path.name in self.stamps}
        return {name: [stamp.inode, stamp.ctime_ns] for name, stamp in sorted(found.items())}

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raise `SourceChangedError` that names a file which is no longer the one it was. paths: of
        this folder; all by default."""
        names = self.stamps if paths is None else {path.name for path in paths}
        for name in sorted(names):
            before = self.stamps.get(name)
            if before is not None:
                _check(self.folder / name, before)

    def contents(self) -> dict[str, str]:
        """sha256 by name of everything but the weights: configs, tokenizer, companions."""
        self.check()
        return {
            name: files.digest(files.real_path(self.folder / name))["sha256"]
            for name, stamp in self.stamps.items()
            if not name.endswith(".safetensors") and stamp.size <= _LARGE
        }


def _is_used(name: str) -> bool:
    return name.endswith(_SUFFIXES) or _NAMES.fullmatch(name) is not None


def _check(path: Path, before: Stamp) -> None:
    try:
        now = Stamp.of(path)
    except OSError as error:
        names = []
        changed = f"is gone ({os.strerror(error.errno or 0)})"
    else:
        if now == before:
            return
        parts = ("size", "mtime_ns", "ctime_ns", "inode")
        names = [part for part in parts if getattr(now, part) != getattr(before, part)]
        changed = f"is not the file that it was when the run began ({', '.join(names)} changed)"
    raise SourceChangedError(
        f"{path}: {changed}; the result would mix two models, so none was written: see that "
        "nothing changes the source, then repeat the command",
        may_be_same=bool(names)
        and set(names) <= {"ctime_ns", "inode"}
        and path.suffix == ".safetensors",
    )
