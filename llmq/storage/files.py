"""Writing folders so that they are there as a whole or not at all: fsync, rename, manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmq.errors import LlmqError

MANIFEST = "llmq-manifest.json"


class WriteError(LlmqError):
    """A file could not be written, mostly for want of space: what was finished before is worth
    keeping."""


def unwritable(path: object, reason: object) -> WriteError:
    """The error for a file that cannot be written."""
    return WriteError(
        f"{path}: cannot be written ({reason}); make space on this disk, then repeat the command"
    )


def sync(path: Path) -> None:
    """Make a file or a directory entry durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and make it durable. Raises `WriteError` when the disk is full or
    the file too large."""
    try:
        path.touch()
        mode = (
            path.stat().st_mode
        )  # what the umask gives; safetensors renames a file of mode 0600 to this place
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
        path.chmod(mode)
        sync(path)
    except (SafetensorError, OSError) as error:
        raise unwritable(path, error) from None


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, make it durable, rename."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    sync(partial)
    partial.replace(path)


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


def write_manifest(target_dir: Path) -> None:
    """The last file: sha256 and size of every other one. A folder with it was written by llmq and
    is complete."""
    entries = {}
    for path in sorted(path for path in target_dir.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            entries[path.relative_to(target_dir).as_posix()] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": path.stat().st_size,
            }
        sync(path)
    write_json(target_dir / MANIFEST, {"files": entries})
    sync(target_dir)


def check_output(out_dir: Path, overwrite: bool) -> None:
    """Refuse an output that exists, or that cannot be written. Only folders that llmq wrote can be
    overwritten."""
    if out_dir.exists() or out_dir.is_symlink():
        if not overwrite:
            raise LlmqError(
                f"{out_dir}: exists already; choose another output, or give --overwrite to replace it"
            )
        if not (out_dir / MANIFEST).is_file():
            raise LlmqError(
                f"{out_dir}: was not written by llmq (it has no {MANIFEST}), so --overwrite leaves it alone; remove it yourself or choose another output"
            )
    parent = out_dir.absolute().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise LlmqError(
            f"{out_dir}: {existing} is not a folder that can be written; choose another output"
        )


def check_space(folder: Path, n_bytes: int) -> None:
    """Refuse to start what will fill the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise LlmqError(
            f"{folder}: {free / 1e9:.2f} GB are free, and output and activations need about {n_bytes / 1e9:.2f} GB; make space, choose an output elsewhere or give fewer --samples"
        )


def make_folder(folder: Path) -> list[Path]:
    """Create a folder with its parents. Returns those that were not there, innermost first, for
    `remove_empty`."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those folders that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def aside_of(out_dir: Path) -> Path:
    """Where an output waits while another takes its place."""
    return out_dir.with_name(f".{out_dir.name}.replaced")


def publish(finished_dir: Path, out_dir: Path) -> None:
    """Put a finished folder in its place by renaming; an earlier output is moved aside first and
    removed after."""
    out_dir = out_dir.resolve()  # a link stays, what it points to is replaced
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(out_dir)
    if out_dir.exists():
        if aside.exists():
            shutil.rmtree(aside)
        out_dir.rename(aside)
    finished_dir.replace(out_dir)
    with contextlib.suppress(OSError):  # some file systems cannot sync directories
        sync(out_dir.parent)
    if aside.exists():
        shutil.rmtree(aside)
