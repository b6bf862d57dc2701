"""What this machine has, for advice; no result depends on it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.max")
LIBRARY_BYTES = 500_000_000  # torch and transformers, once they are imported


def memory_bytes() -> int | None:
    """Memory of the machine, or of the container that this runs in; None where nobody says."""
    sizes = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a system that has no answer
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        sizes.append(int(_CGROUP.read_text()))
    return min(sizes, default=None)


def timed_device(device: str) -> str:
    """The device to measure on for a run on `device`: the CPU where that is not there."""
    import torch

    return device if device.startswith("cuda") and torch.cuda.is_available() else "cpu"
