"""The container: what is written is read, and a damaged file is an error that names it."""

import random

import pytest
import torch

from llmq.errors import LlmqError
from llmq.formats.gguf.container import GgufFile
from llmq.formats.gguf.tensor_types import BY_NAME
from llmq.formats.gguf.writer import Entry, write_gguf

FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "a.negative": -3,
    "a.large": 1 << 40,
    "a.real": 0.5,
    "a.flag": True,
    "a.texts": ["", "b\u00e9", "c"],
    "a.numbers": [1, -2, 3],
    "a.reals": [0.25, -1.0],
    "a.flags": [True, False],
    "a.nothing": [],
}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.gguf"
    entries = [
        Entry("first.weight", (3, 64), BY_NAME["Q8_0"]),
        Entry("second.weight", (5,), BY_NAME["F32"]),
    ]
    contents = [torch.arange(3 * 68, dtype=torch.uint8), torch.arange(5.0).view(torch.uint8)]
    size = write_gguf(path, FIELDS, entries, contents)
    assert path.stat().st_size == size
    return path, entries, contents


def test_what_is_written_is_read(written):
    path, entries, contents = written
    file = GgufFile(path)
    assert file.fields == FIELDS
    for entry, content in zip(entries, contents, strict=True):
        stored = file.tensors[entry.name]
        assert (stored.shape, stored.type) == (entry.shape, entry.type)
        assert stored.start % 32 == 0
        assert torch.equal(file.read(entry.name), content)
    assert list(path.parent.iterdir()) == [path]


def test_the_gguf_package_reads_the_same(written):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, the reader of llama.cpp")
    path, entries, contents = written
    reader = gguf.GGUFReader(path)
    assert reader.get_field("a.texts").contents() == FIELDS["a.texts"]
    assert reader.get_field("a.negative").contents() == -3
    for tensor, entry, content in zip(reader.tensors, entries, contents, strict=True):
        assert tensor.name == entry.name
        assert tensor.data.tobytes() == content.numpy().tobytes()


def read_all(path):
    file = GgufFile(path)
    for name in file.tensors:
        file.read(name)


def test_a_file_that_was_cut_off_is_refused(written, tmp_path):
    path, _, _ = written
    content = path.read_bytes()
    end = GgufFile(path).tensors["second.weight"]
    cut = tmp_path / "cut.gguf"
    for length in range(end.start + end.n_bytes):
        cut.write_bytes(content[:length])
        with pytest.raises(LlmqError, match=r"cut\.gguf"):
            read_all(cut)


def test_flipped_bits_never_end_in_anything_but_an_error(written, tmp_path):
    path, _, _ = written
    content = path.read_bytes()
    header = GgufFile(path).tensors["first.weight"].start
    chance = random.Random(0)
    flipped = tmp_path / "flipped.gguf"
    n_refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(header)] ^= 1 << chance.randrange(8)
        flipped.write_bytes(damaged)
        try:
            read_all(flipped)
        except LlmqError:
            n_refused += 1
    assert n_refused > 100


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, (9).to_bytes(4, "little"), "version 9"),
        (8, (2**60).to_bytes(8, "little"), "bytes more"),
        (16, (2**60).to_bytes(8, "little"), "bytes more"),
        (24, (2**40).to_bytes(8, "little"), "a name of"),
    ],
)
def test_counts_beyond_the_file_are_refused_before_anything_is_reserved(
    written, place, value, expected
):
    path, _, _ = written
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(LlmqError, match=expected):
        GgufFile(path)
