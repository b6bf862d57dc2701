"""Single rows, read from the layouts of backends: the canonical words of these rows."""

import pytest
import torch

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.compiled import prepared
from llmq_kernels.core.registry import BACKENDS
from llmq_kernels.torch_cpu import int8pack
from llmq_kernels.triton import layout

INDEX = torch.tensor([76, 0, 33, 33, 16])


def weight(spec, n=77, k=200):
    torch.manual_seed(0)
    return QuantizedTensor.quantize(torch.randn(n, k), QuantSpec.parse(spec)).as_packed()


@pytest.mark.parametrize("spec", ["w8", "w4g32", "w3g64-asym", "w2g32-asym", "ternary-g32"])
def test_rows_of_every_layout(spec):
    canonical = weight(spec)
    expected = canonical.packed[INDEX]
    state = prepared.prepare(canonical, torch.bfloat16)
    assert torch.equal(prepared.rows(canonical, state, INDEX), expected)
    units = layout.pack_units(canonical)
    assert torch.equal(layout.unpack_units(canonical, units[INDEX]), expected)
    if canonical.code.bits != 3:
        words = layout.pack_bytes(canonical)
        assert torch.equal(layout.unpack_bytes(canonical, words[INDEX]), expected)
    if spec == "w8":
        state = int8pack.prepare(canonical, torch.bfloat16)
        assert torch.equal(int8pack.rows(canonical, state, INDEX), expected)


@pytest.mark.parametrize("spec", ["w8", "w4g32"])
def test_rows_of_the_backends_of_this_machine(spec):
    canonical = weight(spec, n=96, k=256)
    found = []
    for backend in BACKENDS:
        device = torch.device("cpu")
        if backend.rows and not backend.refusal(canonical, torch.bfloat16, device):
            state = backend.prepare(canonical, torch.bfloat16)
            assert torch.equal(backend.rows(canonical, state, INDEX), canonical.packed[INDEX])
            found.append(backend.name)
    assert found or spec != "w8"  # cpu-int8 runs everywhere
