"""What this process is allowed to execute.

Hardened services forbid memory that was written to become executable (PR_SET_MDWE, systemd's
MemoryDenyWriteExecute, SELinux without execmem). Compilers in the process then fail: LLVM ends the
process, oneDNN raises. Asking the system is a question of microseconds and kills nobody."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

_PAGE = mmap.PAGESIZE


def forbidden() -> str | None:
    """Why memory cannot be made executable here, or None. Asked anew each time: a process can
    give the right up while it runs."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    allocate, protect, release = libc.mmap, libc.mprotect, libc.munmap
    allocate.restype = ctypes.c_void_p
    allocate.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    )
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    release.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = allocate(None, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if page is None or page == ctypes.c_void_p(-1).value:
        return None  # out of memory, which is another matter
    try:
        if protect(page, _PAGE, mmap.PROT_READ | mmap.PROT_EXEC) == 0:
            return None
        return (
            f"this process may not execute memory that it wrote ({os.strerror(ctypes.get_errno())})"
        )
    finally:
        release(page, _PAGE)
