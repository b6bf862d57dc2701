"""A checkpoint that grows block by block, and becomes a folder of shards at the end.

    .OUT.llmq-partial/
        state.json            what is being made, from what
        lock                  held while a run works on it
        inputs-*.bin, .seal   the inputs of the next block
        blocks/00003.safetensors
        blocks/00003.json     of a finished block: its report, its hash and those of its tensors
        checkpoint/           the folder that will be renamed to OUT
        blocks/model-00001-of-00002.safetensors.json
                              of a finished shard in it: its hash, and those of its blocks

A block is finished when its file has its name: it is renamed last, after inputs and record are
durable. What lies outside of the blocks is kept as one more behind them. When all are there, whole
blocks are streamed into shards, and go when a shard that holds them is durable, was read back and
has its name: the disk holds the output and one shard more, never the output twice. From there on
blocks are read from shards, where an interrupted run still needs them.

Nothing in `checkpoint/` can be loaded before the config is written, at the end."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmq.errors import VerificationError
from llmq.storage import files, packing, seals
from llmq.storage.workspace import LOCK, STATE, Workspace, tell, work_dir_of


class PartialCheckpoint(Workspace):
    """A checkpoint that survives being killed.

    out_dir: where the finished folder goes. n_blocks: of the model. `outside` is the number of the
    part that is no block: embeddings, norms and head."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], n_blocks: int) -> None:
        # beside what a link points to, so that renaming never crosses file systems
        self.out_dir = files.real_path(out_dir)
        work_dir = work_dir_of(self.out_dir)
        self.checkpoint_dir = work_dir / "checkpoint"
        self.blocks_dir = work_dir / "blocks"
        self.n_blocks = self.outside = n_blocks
        # By name of shard: its record where it is as it was finished, and in any case the hashes of
        # its tensors, from which whole blocks can still be told.
        self._shards: dict[str, dict[str, Any]] = {}
        self._packed: dict[str, dict[str, str]] = {}
        self._finished: set[int] = set()
        super().__init__(work_dir, identity, STATE)
        try:
            self._find_shards()
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

    def _find_shards(self) -> None:
        """The shards that are there, and those of them that are as they were finished."""
        for shard in sorted(self.checkpoint_dir.glob("model*.safetensors")):
            try:
                digest, self._packed[shard.name] = packing.digests(shard)
                record = seals.read_sealed(self._shard_record_path(shard.name))
                is_sound = record["file"] == digest
            except files.DamagedError:
                is_sound = False
            if is_sound:
                self._shards[shard.name] = record
            else:
                tell(
                    f"{shard}: it or its record is not as it was when the shard was finished; it "
                    "is made again"
                )

    def _check_finished(self) -> None:
        """Find out which blocks are finished, and which of them are as they were then. damaged:
        those before the last one that is; redone: all that were finished and have to be again."""
        indices = range(self.n_blocks)
        self._finished = {index for index in range(self.outside + 1) if self._is_sound(index)}
        lost = [index for index in indices if index not in self._finished]
        self.n_finished = max((i + 1 for i in indices if i in self._finished), default=0)
        self.damaged = [index for index in lost if index < self.n_finished]
        self.redone = []
        n_sound = self.n_blocks - len(lost)
        for index in lost:
            if os.path.lexists(self.block_path(index)):
                kept = f", the other {n_sound} finished ones are kept" if n_sound else ""
                tell(
                    f"{self.block_path(index)}: it or its record is not as it was when block "
                    f"{index} was finished; that block is done again{kept}"
                )
                files.remove(self.block_path(index))
                self.redone.append(index)
            elif index in self.damaged or self._was_packed(index):
                self.redone.append(index)
                tell(f"{self.block_path(index)}: is missing; block {index} is done again")

    def _was_packed(self, index: int) -> bool:
        """Whether a block was finished that is not there: shards come when all blocks are."""
        return bool(self._packed) and os.path.lexists(self._record_path(index))

    def _is_sound(self, index: int) -> bool:
        """Whether a block, or what lies outside of them, is there as it was finished."""
        try:
            record = self._record(index)
        except files.DamagedError:
            return False
        return self._shard_of(record) is not None or seals.matches(
            self.block_path(index), record.get("file")
        )

    def is_finished(self, index: int) -> bool:
        """Whether a block, or what lies outside of them, counts as finished."""
        return index in self._finished

    def _record_path(self, index: int) -> Path:
        return self.blocks_dir / f"{index:05d}.json"

    def _shard_record_path(self, name: str) -> Path:
        return self.blocks_dir / f"{name}.json"

    def _record(self, index: int) -> dict[str, Any]:
        record = seals.read_sealed(self._record_path(index))
        return record if isinstance(record, dict) else {}

    def _shard_of(self, record: dict[str, Any]) -> Path | None:
        """The shard that holds all tensors of a block as its record has them."""
        tensors = record.get("tensors", {})
        for name, hashes in self._packed.items():
            if tensors and tensors.items() <= hashes.items():
                return self.checkpoint_dir / name
        return None

    def _place_of(self, index: int) -> Path:
        """The file to read a finished block from."""
        own = self.block_path(index)
        if files.is_plain_file(own):
            return own
        return self._shard_of(self._record(index)) or own

    def forget_after(self, index: int) -> None:
        """Blocks behind this one are not finished any more: it came out otherwise than before."""
        for later in range(index + 1, self.outside + 1):
            files.remove(self._record_path(later))  # without it, no shard holds the block either
            files.remove(self.block_path(later))
            self._finished.discard(later)
        files.sync_folder(self.blocks_dir)

    def block_path(self, index: int) -> Path:
        return self.blocks_dir / f"{index:05d}.safetensors"

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write a block under a temporary name and return what was written, read back from the
        file. Raises `VerificationError` when a bit of it differs."""
        return dict(self.written(index, tensors))

    def written(self, index: int, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`write_block` tensor by tensor, for those of which two copies at a time would be too
        much: embeddings and head of a large vocabulary."""
        path = self.block_path(index).with_suffix(".tmp")
        files.write_tensors(path, tensors)
        with safe_open(path, framework="pt") as block:
            stored = set(block.keys())
        for name in sorted(tensors.keys() | stored):
            tensor = _read(path, name) if name in stored else None
            if tensor is None or name not in tensors or not _same_bits(tensors[name], tensor):
                raise VerificationError(
                    f"{path.name}: tensor {name} read back differs from the one written; the disk "
                    "or the memory is faulty"
                )
            yield name, tensor

    def add(self, index: int, tensors: Mapping[str, packing.StoredTensor]) -> None:
        """Put tensors that lie in other files into a block that was written and is not finished,
        byte for byte, a part at a time."""
        path = self.block_path(index).with_suffix(".tmp")
        merged = self.block_path(index).with_suffix(".merged")
        _, hashes = packing.digests(path)
        every = {**packing.stored_tensors(path), **tensors}
        packing.merge(merged, every, {**hashes, **packing.hashes_of(tensors)})
        merged.replace(path)

    def finish_block(
        self, index: int, report: dict[str, Any] | None = None, source: dict[str, Any] | None = None
    ) -> None:
        """Record the hash of a block that was written, and give it its name: from here on it is
        part of the result. source: what tells the weights that it was made of."""
        path = self.block_path(index)
        partial = path.with_suffix(".tmp")
        digest, tensors = packing.digests(partial)
        seals.write_sealed(
            self._record_path(index),
            {"report": report, "source": source, "file": digest, "tensors": tensors},
        )
        partial.replace(path)
        files.sync_folder(self.blocks_dir)
        self._finished.add(index)

    def finish_again(self, index: int, about: dict[str, Any]) -> None:
        """The same for another version of a block that was finished, made of the same source.
        about: joins its report."""
        record = self._record(index)
        self.finish_block(index, {**(record["report"] or {}), **about}, record["source"])

    def sources(self) -> list[dict[str, Any]]:
        """What the finished blocks were made of."""
        records = [self._record(index) for index in sorted(self._finished)]
        return [record["source"] for record in records if record["source"]]

    def forget_all(self, reason: str) -> None:
        """No block is finished any more."""
        tell(f"{self.work_dir}: {reason}; starting over")
        self.forget_after(-1)
        self.n_finished, self.damaged, self.redone = 0, [], []

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""
        path = self._place_of(index)
        return {name: _read(path, name) for name in self._record(index)["tensors"]}

    def block_reports(self) -> list[dict[str, Any]]:
        """The reports of all finished blocks, those of earlier runs included."""
        return [self._record(index)["report"] for index in range(self.n_blocks)]

    def report_of(self, index: int) -> dict[str, Any] | None:
        """The report of a finished block, or of what lies outside of them."""
        report: dict[str, Any] | None = self._record(index)["report"]
        return report

    def keep_only_blocks(self) -> None:
        """Remove the inputs of blocks, which nobody needs any more, but not their seals: these tell
        whether a block that has to be done again gives what it gave. And what lies in the
        checkpoint beside its shards: of killed writes, or planted."""
        kept = {STATE, LOCK, self.checkpoint_dir.name, self.blocks_dir.name}
        for path in self.work_dir.iterdir():
            if path.name not in kept and path.suffix != seals.SUFFIX:
                files.remove(path)
        self._keep_shards(self._packed)

    def _keep_shards(self, names: Collection[str]) -> None:
        for path in self.checkpoint_dir.iterdir():
            if path.name not in names:
                files.remove(path)

    def pack(self) -> dict[str, dict[str, packing.StoredTensor]]:
        """Stream everything that is finished into shards. Returns the tensors of each by its name.
        Raises `DamagedError` when a tensor is not the one that was verified."""
        parts = [self._record(index)["file"] for index in range(self.outside + 1)]
        groups = packing.group_by_size([part["bytes"] for part in parts], packing.MAX_SHARD_BYTES)
        names = packing.shard_names(len(groups))
        for name, group in zip(names, groups, strict=True):
            blocks = {str(index): parts[index] for index in group}
            if self._shards.get(name, {}).get("blocks") != blocks:
                self._write_shard(name, group)
            for index in group:
                files.remove(self.block_path(index))
        self._keep_shards(names)
        return {name: packing.stored_tensors(self.checkpoint_dir / name) for name in names}

    def _write_shard(self, name: str, group: list[int]) -> None:
        path = self.checkpoint_dir / name
        partial = path.with_suffix(".tmp")
        tensors: dict[str, packing.StoredTensor] = {}
        hashes: dict[str, str] = {}
        for index in group:
            there = packing.stored_tensors(self._place_of(index))
            own = self._record(index)["tensors"]
            if missing := own.keys() - there.keys():
                raise files.DamagedError(
                    f"{self._place_of(index)}: has no tensor {min(missing)}; repeat the command to "
                    "do this part again"
                )
            tensors |= {tensor: there[tensor] for tensor in there if tensor in own}
            hashes |= own
        digest = packing.merge(partial, tensors, hashes)
        if files.digest(partial) != digest:
            raise VerificationError(
                f"{partial}: reads back otherwise than it was written; the disk or the memory is "
                "faulty"
            )
        blocks = {str(index): self._record(index)["file"] for index in group}
        record = {"file": digest, "blocks": blocks}
        seals.write_sealed(self._shard_record_path(name), record)
        partial.replace(path)
        files.sync_folder(self.checkpoint_dir)
        self._shards[name], self._packed[name] = record, hashes

    def publish(self) -> None:
        """Complete the folder with the manifest and rename it to its place."""
        names = {path.name for path in self.checkpoint_dir.iterdir()} & self._shards.keys()
        digests = {name: self._shards[name]["file"] for name in names}
        files.write_manifest(self.checkpoint_dir, digests)
        files.publish(self.checkpoint_dir, self.out_dir)
        self.remove()


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
