"""Blocks: bytes and codes are inverse to each other, and the values are those of the gguf package
where it is installed."""

import pytest
import torch

from llmq.formats.gguf.blocks import BLOCKS, decode_q4_1, dequantize, encode_q4_1
from llmq.formats.gguf.tensor_types import BY_NAME

N, K = 5, 512
KINDS = [*BLOCKS, "Q4_1"]


def some_bytes(name: str) -> torch.Tensor:
    """Rows of blocks with any codes and finite scales."""
    kind = BY_NAME[name]
    content = torch.randint(0, 256, (N, K // kind.block, kind.n_bytes), dtype=torch.uint8)
    places = {"TQ2_0": (64,), "Q4_1": (0, 2)}.get(name, (0,))
    for place in places:
        scale = torch.randn(N, K // kind.block).half()
        content[..., place : place + 2] = scale.view(torch.uint8).view(*scale.shape, 2)
    return content.view(N, -1)


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_that_were_read(name):
    content = some_bytes(name)
    if name == "Q4_1":
        assert torch.equal(encode_q4_1(*decode_q4_1(content, (N, K))), content)
    else:
        block = BLOCKS[name]
        assert torch.equal(block.encode(*block.decode(content, (N, K))), content)


@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, the reader of llama.cpp")
    if not hasattr(gguf.GGMLQuantizationType, name):
        pytest.skip(f"this gguf package has no {name}")
    content = some_bytes(name)
    expected = gguf.quants.dequantize(content.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(dequantize(name, content, (N, K)), torch.from_numpy(expected.copy()))


def test_q2_0_has_four_neighbours_in_a_byte():
    """Not in gguf 0.19: from the definition, w = d (c - 1)."""
    content = torch.zeros(1, 18, dtype=torch.uint8)
    content[0, :2] = torch.tensor([0.5]).half().view(torch.uint8)
    content[0, 2] = 0b11_10_01_00
    values = dequantize("Q2_0", content, (1, 64))
    assert values[0, :5].tolist() == [-0.5, 0.0, 0.5, 1.0, -0.5]


def test_sizes_are_those_of_the_gguf_package():
    constants = pytest.importorskip("gguf.constants", reason="needs the package gguf")
    for kind, sizes in constants.GGML_QUANT_SIZES.items():
        ours = BY_NAME[kind.name]
        assert (ours.number, (ours.block, ours.n_bytes)) == (int(kind), sizes)
