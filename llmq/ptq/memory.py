"""Giving freed memory back to the operating system.

glibc takes tensors from the heap, and the largest size for which it does so grows by itself to 32 MB: a weight of 2048 x 2048 in float32 then leaves a hole where it was, which stays resident beside
what the next block needs. So a process that quantizes maps whatever is larger than 8 MB, which goes back when it is freed, and has holes of smaller tensors returned between solves.
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


LARGE = 8 << 20  # bytes; a batch of activations is smaller and is reused from the heap, which spares the system clearing its pages each time
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def map_large_tensors() -> bool:
    """Have memory for large tensors mapped and unmapped, for the rest of this process. False where the C library is not glibc: then nothing happens."""
    library = _libc()
    if library is None:
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, LARGE) and library.mallopt(_M_TRIM_THRESHOLD, 8 * LARGE))


def release_freed_memory() -> bool:
    """Return every free page of the heap, holes in its middle included. A few milliseconds. False where the C library is not glibc: then nothing happens."""
    library = _libc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True
