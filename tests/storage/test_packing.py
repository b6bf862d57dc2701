"""Files streamed into one: the same tensors, bit by bit, aligned, and the hash on the way."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.storage import files, packing
from llmq.storage.files import DamagedError

# Odd numbers of bytes, which would leave the next file's numbers unaligned.
PARTS = [
    {"a.codes": torch.arange(7, dtype=torch.uint8), "a.scale": torch.randn(3, 5).half()},
    {"b.weight": torch.randn(5, 3), "b.empty": torch.zeros(0, 4), "b.one": torch.tensor(3)},
    {"c.flag": torch.tensor([True, False, True]), "\u00e9.bias": torch.randn(9).bfloat16()},
]


@pytest.fixture
def parts(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(PARTS))]
    for path, tensors in zip(paths, PARTS, strict=True):
        save_file(tensors, path, metadata={"format": "pt"})
    return paths


def merged(parts, out):
    tensors, hashes = {}, {}
    for path in parts:
        digest, own = packing.digests(path)
        assert digest == files.digest(path)
        tensors |= packing.stored_tensors(path)
        hashes |= own
    return packing.merge(out, tensors, hashes)


def test_nothing_changes_but_the_file(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_BYTES", 5)
    out = tmp_path / "out.safetensors"
    digest = merged(parts, out)
    assert digest == files.digest(out)
    found = load_file(out)
    wanted = {name: tensor for part in PARTS for name, tensor in part.items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert all(
        stored.start % stored.element_bytes == 0 for stored in packing.stored_tensors(out).values()
    )


def test_a_byte_that_changed_is_noticed(parts, tmp_path):
    tensors, hashes = packing.stored_tensors(parts[1]), packing.digests(parts[1])[1]
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    with pytest.raises(DamagedError, match=r"1\.safetensors: changed after it was written"):
        packing.merge(tmp_path / "out", tensors, hashes)
    parts[1].write_bytes(content[:40])
    with pytest.raises(DamagedError, match="not the file that llmq wrote"):
        packing.stored_tensors(parts[1])


def test_neighbours_share_a_shard():
    assert packing.group_by_size([4, 4, 4, 9, 1, 1], 8) == [[0, 1], [2], [3], [4, 5]]
    assert packing.shard_names(1) == ["model.safetensors"]
    assert packing.shard_names(2)[1] == "model-00002-of-00002.safetensors"
