"""A checkpoint that grows block by block and survives being killed.

    .OUT.llmq-partial/
        state.json            what is being made, from what: a run resumes only what it would have
                              made itself
        lock                  held while a run works on it
        inputs-*.bin          the inputs of the next block
        blocks/00003.json     the report of a finished block
        checkpoint/           the folder that will be renamed to OUT; one shard per block, under its
                              final name

A block is finished when its shard has its name: the shard is renamed last, after inputs and report
are durable. Nothing in `checkpoint/` can be loaded before the config is written, at the end."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmq.errors import LlmqError, VerificationError
from llmq.storage import files


class PartialCheckpoint:
    """out_dir: where the finished folder goes. identity: everything that decides the bytes of the
    result, JSON-able. n_shards: shards of the finished checkpoint."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], n_shards: int) -> None:
        self.out_dir = (
            out_dir.resolve()
        )  # beside what a link points to, so that renaming never crosses file systems
        self.work_dir = work_dir_of(self.out_dir)
        self.checkpoint_dir = self.work_dir / "checkpoint"
        self.n_shards = n_shards
        self._open(identity)

    def _open(self, identity: dict[str, Any]) -> None:
        state_path = self.work_dir / "state.json"
        if self.work_dir.exists() and not (self.checkpoint_dir.is_dir() and state_path.is_file()):
            shutil.rmtree(
                self.work_dir
            )  # killed before the first or after the last step: nothing in it is needed
        if state_path.is_file():
            stored = json.loads(state_path.read_text())
            differing = sorted(
                key
                for key in identity.keys() | stored.keys()
                if identity.get(key) != stored.get(key)
            )
            if differing:
                parts = ", ".join(_differences(stored, identity))
                raise LlmqError(
                    f"{self.work_dir}: holds an interrupted run with another {' and '.join(differing)} ({parts}); repeat its command as it was to finish it, or remove that folder to start over"
                )
        self._made = files.make_folder(self.checkpoint_dir)
        (self.work_dir / "blocks").mkdir(exist_ok=True)
        self._lock = (self.work_dir / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LlmqError(
                f"{self.work_dir}: another llmq is working on this output; wait for it or choose another output"
            ) from None
        files.write_json(state_path, identity)

    def shard_path(self, index: int) -> Path:
        return self.checkpoint_dir / f"model-{index + 1:05d}-of-{self.n_shards:05d}.safetensors"

    def n_finished(self) -> int:
        """Blocks that need not be done again."""
        return next(
            i
            for i in range(self.n_shards + 1)
            if i == self.n_shards or not self.shard_path(i).is_file()
        )

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
                    f"{path.name}: tensor {name} read back differs from the one written; the disk or the memory is faulty"
                )
            yield name, tensor

    def finish_shard(self, index: int, report: dict[str, Any] | None = None) -> None:
        """Give the shard its name: from here on it is part of the result."""
        if report is not None:
            files.write_json(self.work_dir / "blocks" / f"{index:05d}.json", report)
        path = self.shard_path(index)
        path.with_suffix(".tmp").replace(path)
        files.sync(self.checkpoint_dir)

    def block_reports(self) -> list[dict[str, Any]]:
        """The reports of all finished blocks, those of earlier runs included."""
        return [
            json.loads(path.read_text())
            for path in sorted((self.work_dir / "blocks").glob("*.json"))
        ]

    def publish(self) -> None:
        """Complete the folder with index and manifest and rename it to its place."""
        for leftover in self.checkpoint_dir.glob("*.tmp"):
            leftover.unlink()
        files.write_manifest(self.checkpoint_dir)
        files.publish(self.checkpoint_dir, self.out_dir)
        self.close()
        shutil.rmtree(self.work_dir)

    def discard(self) -> None:
        """Remove everything, after an error that repeating the command would meet again."""
        self.close()
        shutil.rmtree(self.work_dir, ignore_errors=True)
        files.remove_empty(self._made)

    def close(self) -> None:
        self._lock.close()


def work_dir_of(out_dir: Path) -> Path:
    """Where the work on an output lies."""
    return out_dir.with_name(f".{out_dir.name}.llmq-partial")


def check_output(out_dir: Path, overwrite: bool) -> None:
    """`files.check_output`, after removing what a run left behind that was killed when its output
    was in place already."""
    resolved = out_dir.resolve()
    if (resolved / files.MANIFEST).is_file():
        if not (work_dir_of(resolved) / "checkpoint").exists():
            shutil.rmtree(work_dir_of(resolved), ignore_errors=True)
        shutil.rmtree(files.aside_of(resolved), ignore_errors=True)
    files.check_output(out_dir, overwrite)


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
