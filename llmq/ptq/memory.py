"""Giving freed memory back to the operating system.

glibc takes tensors from the heap, and the largest size for which it does so grows by itself to 32
MB: a weight of 2048 x 2048 in float32 then leaves a hole where it was, which stays resident beside
what the next block needs. So a process that quantizes maps large tensors, which go back when they
are freed, and has holes of smaller ones returned between solves.

Mapped memory is cleared by the system each time it is taken. Beside the work of a large block that
is nothing, and so all of its tensors are mapped. Beside that of a small one it shows: a model of 6M
parameters takes 13.4 s instead of 11.8 (means of 5 runs); there batches of activations, 4 MB, come
from the heap."""

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


LARGE, LARGE_OF_LARGE_BLOCKS = 8 << 20, 1 << 20  # bytes from which tensors are mapped
LARGE_BLOCK = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def map_large_tensors(block_bytes: int) -> bool:
    """Have memory for large tensors mapped and unmapped, for the rest of this process. block_bytes:
    of a block in float32. False where the C library is not glibc: then nothing happens."""
    library = _libc()
    if library is None:
        return False
    large = LARGE if block_bytes < LARGE_BLOCK else LARGE_OF_LARGE_BLOCKS
    return bool(
        library.mallopt(_M_MMAP_THRESHOLD, large) and library.mallopt(_M_TRIM_THRESHOLD, 8 * large)
    )


def release_freed_memory() -> bool:
    """Return every free page of the heap, holes in its middle included. A few milliseconds. False
    where the C library is not glibc: then nothing happens."""
    library = _libc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True
