"""pack and unpack are inverse at every width and shape, and the layout is the continuous
little-endian bitstream."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq_kernels import CODES, pack, packed_width, unpack


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    n=st.integers(1, 9),
    k=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack(bits, n, k, seed):
    codes = torch.randint(
        0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.shape == (n, packed_width(k, bits))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed, bits, k), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout_is_a_little_endian_bitstream(bits):
    codes = torch.randint(0, 1 << bits, (3, 64), dtype=torch.uint8)
    stream = ((codes[:, :, None] >> torch.arange(bits)) & 1).to(torch.uint8).numpy().reshape(3, -1)
    expected = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    assert np.array_equal(pack(codes, bits).numpy(), expected)


def test_unused_bits_are_zero():
    assert int(pack(torch.full((1, 3), 7, dtype=torch.uint8), 3)[0, 0]) == 0b111111111


def test_codes_fit_their_width():
    for code in CODES.values():
        assert code.levels <= 1 << code.bits
        assert 0 <= code.offset <= code.max
