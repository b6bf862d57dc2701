"""What this process is allowed to execute.

Hardened services forbid memory that was written to become executable (PR_SET_MDWE, systemd's
MemoryDenyWriteExecute, SELinux without execmem). Compilers in the process then fail: LLVM ends the
process, oneDNN raises. Asking the system is a question of microseconds and kills nobody.

What is known of this process stands here, too: whether memory was found to be forbidden, which
forms of compiled kernels died in their probe, and whether the process is itself a trial."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import dataclass, field

_PAGE = mmap.PAGESIZE


@dataclass
class Process:
    """forbidden: why memory cannot be made executable, once that was found; what was given up does
    not come back. dead: form of compiled kernels -> why it is not offered although the CPU has it.
    is_trial: what is compiled is used without a probe, and none of it is kept."""

    forbidden: str | None = None
    dead: dict[str, str] = field(default_factory=dict)
    is_trial: bool = False


this = Process()


def forbidden() -> str | None:
    """Why memory cannot be made executable here, or None. Asked anew each time: a process can
    give the right up while it runs."""
    this.forbidden = this.forbidden or _ask()
    return this.forbidden


def _ask() -> str | None:
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
