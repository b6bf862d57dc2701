"""Freed memory goes back to the system, holes included."""

import sys
from pathlib import Path

import pytest
import torch

from llmq.ptq.memory import release_freed_memory


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_holes_are_returned():
    if not release_freed_memory():
        pytest.skip("the C library is not glibc, which has nothing to call")
    tensors = [torch.ones(100_000) for _ in range(400)]  # 160 MB in pieces of 0.4 MB
    kept = tensors[::40]
    before = resident_mb()
    del tensors
    release_freed_memory()
    assert resident_mb() < before - 100
    assert all(float(tensor.sum()) == 100_000 for tensor in kept)
