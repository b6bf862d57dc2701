"""Freed memory goes back to the system, holes included."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.ptq.memory import release_freed_memory


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
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


LARGE_TENSORS = """
import torch
from llmq.ptq.memory import LARGE, LARGE_BLOCK, map_large_tensors
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
print(map_large_tensors(LARGE_BLOCK - 1))
before = resident_mb()
tensors = [torch.ones(LARGE // 4 + 1000) for _ in range(20)]
kept, held = tensors[10], resident_mb()
del tensors
print(held - before, resident_mb() - before, float(kept[-1]))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_large_tensors_leave_no_holes():
    """In a process of its own: one with a past has holes that are filled first."""
    is_set, figures = subprocess.run(
        [sys.executable, "-c", LARGE_TENSORS], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if is_set != "True":
        pytest.skip("the C library is not glibc, which has nothing to call")
    held, left, value = map(float, figures.split())
    assert held > 150
    assert left < 30, "all but one are gone at once"
    assert value == 1
