"""A finished folder against the manifest that was written with it: sha256 and size of every file.

What llmq computed has to be there bit by bit. A README may be edited, the page be made anew, and
files be added: these are listed."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmq.errors import LlmqError, VerificationError
from llmq.storage import files
from llmq.storage.files import MANIFEST

_EDITABLE = ("README.md", "report.html")
_RECORDS = (*_EDITABLE, "log.jsonl", "runs/")  # may be left behind: no part of the model
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """Names of files by what was found. damaged: with what differs. edited: documents that may be.
    absent: records of the run that did not come along. extra: not in the manifest."""

    ok: list[str]
    damaged: dict[str, str]
    missing: list[str]
    edited: list[str]
    absent: list[str]
    extra: list[str]
    seconds: float

    @property
    def is_good(self) -> bool:
        return not self.damaged and not self.missing

    @property
    def n_files(self) -> int:
        return (
            len(self.ok)
            + len(self.damaged)
            + len(self.missing)
            + len(self.edited)
            + len(self.absent)
        )

    def to_json(self) -> dict[str, Any]:
        return {"files": self.n_files, **asdict(self)}

    def describe(self) -> str:
        """The faults in one line."""
        faults = [f"{name} {reason}" for name, reason in self.damaged.items()]
        faults += [f"{name} is missing" for name in self.missing]
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        return (
            f"{len(faults)} of {self.n_files} files are not as llmq wrote them: "
            f"{'; '.join(faults[:_SHOWN])}{more}"
        )


def has_manifest(folder: Path) -> bool:
    """Whether there is one to check against."""
    return os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and bytes by name of file. Raises `LlmqError` without a manifest or for one that
    refers to files outside of the folder, `VerificationError` for a damaged one."""
    path = folder / MANIFEST
    if not has_manifest(folder):
        raise LlmqError(
            f"{folder}: has no {MANIFEST}, so there is nothing to check it against; folders that "
            "llmq writes have one"
        )
    if not files.is_plain_file(path):
        raise LlmqError(f"{path}: is no regular file; expected the manifest that llmq wrote")
    try:
        data = json.loads(path.read_bytes())
        entries: dict[str, dict[str, Any]] = data["files"]
        is_whole = data.keys() <= {"files", "sha256"} and all(map(_is_entry, entries.values()))
        # Folders of earlier versions have no hash of the list.
        is_whole = is_whole and data.get("sha256") in (None, files.hash_of_json(entries))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise VerificationError(
            f"{path}: is damaged, so the folder cannot be checked; quantize again, or get the "
            "folder again from where it came"
        )
    for name in entries:
        if not _is_inside(name):
            raise LlmqError(
                f"{path}: names {name!r}; expected plain names of files inside the folder: this "
                "manifest was not written by llmq"
            )
    return entries


def _is_entry(entry: Any) -> bool:
    return (
        entry.keys() == {"sha256", "bytes"}
        and isinstance(entry["bytes"], int)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    is_plain = path.as_posix() == name and "\\" not in name and name.isprintable()
    return is_plain and not path.is_absolute() and ".." not in path.parts and path.parts != ()


def check_hashes(folder: Path) -> Verdict:
    """Read every file of a folder and compare it with the manifest. Raises as `read_manifest`."""
    started = time.monotonic()
    entries = read_manifest(folder)
    verdict = Verdict([], {}, [], [], [], sorted(_names(folder) - entries.keys() - {MANIFEST}), 0.0)
    for name, expected in entries.items():
        path = folder / name
        reason = _difference(path, expected)
        if reason is None:
            verdict.ok.append(name)
        elif not os.path.lexists(path) and name.startswith(_RECORDS):
            verdict.absent.append(name)
        elif name in _EDITABLE:
            verdict.edited.append(name)
        elif os.path.lexists(path):
            verdict.damaged[name] = reason
        else:
            verdict.missing.append(name)
    return Verdict(**{**vars(verdict), "seconds": round(time.monotonic() - started, 3)})


def _difference(path: Path, expected: dict[str, Any]) -> str | None:
    """In what a file is another than the one in the manifest."""
    try:
        found = files.digest(
            files.real_path(path)
        )  # a link of the Hub's cache is what it points to
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if found["bytes"] != expected["bytes"]:
        return f"has {found['bytes']} bytes, expected {expected['bytes']}"
    if found["sha256"] != expected["sha256"]:
        return f"has sha256 {found['sha256'][:12]}..., expected {expected['sha256'][:12]}..."
    return None


def _names(folder: Path) -> set[str]:
    """Every file in a folder and below, without following links to folders."""
    names = set()
    for root, _, file_names in os.walk(folder):
        names |= {(Path(root) / name).relative_to(folder).as_posix() for name in file_names}
    return names


def check_sizes(folder: Path) -> None:
    """Compare the sizes of the weight files with the manifest, where there is one: a look at each.
    Raises `VerificationError` that names the file."""
    if not has_manifest(folder):
        return
    for name, expected in read_manifest(folder).items():
        if not name.endswith(".safetensors"):
            continue
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise VerificationError(
                f"{path}: {found}, expected {expected['bytes']} bytes as in {MANIFEST}; get the "
                "folder again from where it came, or quantize again"
            )


def check_folder(folder: Path) -> Verdict:
    """`check_hashes` that raises `VerificationError` naming what differs."""
    verdict = check_hashes(folder)
    if not verdict.is_good:
        raise VerificationError(
            f"{folder}: {verdict.describe()}; get the folder again from where it came, or quantize "
            "again"
        )
    return verdict
