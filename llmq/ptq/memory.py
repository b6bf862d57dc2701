"""Giving freed memory back to the operating system.

Tensors of up to 32 MB come from the heap, where the C library keeps freed ones: the holes that a block leaves behind would stay resident beside what the next one needs, and grow with the first few
blocks.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _libc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # not a system with a C library that can be asked
        return None


def release_freed_memory() -> bool:
    """Return every free page of the heap, holes in its middle included. A few milliseconds. False where the C library is not glibc: then nothing happens."""
    library = _libc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True
