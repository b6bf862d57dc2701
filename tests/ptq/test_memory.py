"""Freed memory goes back to the system, holes included."""

import sys
from pathlib import Path

import pytest
import torch

from llmq.ptq.memory import LARGE, map_large_tensors, release_freed_memory


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_large_tensors_leave_no_holes():
    if not map_large_tensors():
        pytest.skip("the C library is not glibc, which has nothing to call")
    before = resident_mb()
    tensors = [torch.ones(LARGE // 4 + 1000) for _ in range(20)]
    kept = tensors[10]
    assert resident_mb() > before + 150
    del tensors
    assert resident_mb() < before + 30, "all but one are gone at once"
    assert float(kept[-1]) == 1
