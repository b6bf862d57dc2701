"""What a source stores and the model has no place for: it goes along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmq.models.readers import CheckpointReader
from llmq.storage import files
from llmq.storage.packing import StoredTensor, group_by_size, stored_tensors

PART_BYTES = 512 << 20  # of what is decoded at a time


@contextmanager
def places_of_others(reader: CheckpointReader, work_dir: Path) -> Iterator[dict[str, StoredTensor]]:
    """Where these tensors lie, to be copied: in their own files or, of those that are stored in few
    bits, in files below `work_dir` that hold them in bfloat16. Nothing in the result says what
    their scales would mean, and who reads them expects what is not listed as quantized in full
    precision. The files go when this ends."""
    others = reader.unused()
    as_stored = [name for name in others if reader.shards.is_as_stored(name)]
    found = reader.places(as_stored) if as_stored else {}
    few_bits = [name for name in others if not reader.shards.is_as_stored(name)]
    paths: list[Path] = []
    try:
        for names in _parts(reader, few_bits):
            path = work_dir / f"decoded-{len(paths)}.safetensors"
            paths.append(path)
            files.write_tensors(path, reader.read_stored(names))
            found |= stored_tensors(path)
        yield found
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _parts(reader: CheckpointReader, names: Sequence[str]) -> Iterator[list[str]]:
    sizes = [reader.shards.bytes_of(name) for name in names]
    for group in group_by_size(sizes, PART_BYTES):
        yield [names[index] for index in group]
