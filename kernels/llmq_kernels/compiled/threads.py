"""Machine code as a function, on torch's own threads.

Kernels run in the OpenMP pool that torch itself uses, started through libgomp's `GOMP_parallel`
(LLVM's and Intel's OpenMP have it too) as found from libtorch_cpu. So one thread count,
`torch.set_num_threads`, rules both, and no second pool competes with spinning threads of the first.
Where torch has another runtime, Python threads do it: ctypes lets go of the interpreter lock."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch


@cache
def _gomp_parallel() -> Callable[[int, object, int, int], None] | None:
    """`GOMP_parallel(function, argument, n_threads, flags)` of the OpenMP runtime that torch is
    linked with."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint],
        None,
    )
    return function  # type: ignore[no-any-return]


@cache
def _python_threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "llmq-kernel")


def threads_of() -> str:
    """Whose threads run the kernels."""
    return "torch's OpenMP pool" if _gomp_parallel() else "Python threads"


def float_bits(value: float) -> int:
    """A number as an argument that a kernel reads with `Emitter.number`."""
    return int.from_bytes(struct.pack("<f", value), "little")


# Where the calls of this thread or task are noted instead of made; `recording.Recording` sets it.
RECORDED: ContextVar[list[Callable[[], None]] | None] = ContextVar("recorded", default=None)


class Kernel:
    """Machine code as a function of its int64 arguments (without the counter)."""

    def __init__(self, address: int) -> None:
        self._address, self._single, self._parallel = (
            address,
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address),
            _gomp_parallel(),
        )

    def __call__(self, *arguments: int, threads: int | None = None) -> None:
        """threads: as many as torch has, or a number."""
        array = (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments)
        n_threads = threads or torch.get_num_threads()
        calls = RECORDED.get()
        if calls is None:
            self._start(array, n_threads)
        else:
            calls.append(self._again(array, n_threads))

    def _start(self, array: ctypes.Array[ctypes.c_int64], n_threads: int) -> None:
        if n_threads == 1:
            self._single(array)
        elif self._parallel is not None:
            self._parallel(self._address, array, n_threads, 0)
        else:
            list(_python_threads(n_threads).map(self._single, [array] * n_threads))

    def _again(self, array: ctypes.Array[ctypes.c_int64], n_threads: int) -> Callable[[], None]:
        """The same call with its counter set back, whenever it is made."""

        def call() -> None:
            array[0] = 0
            self._start(array, n_threads)

        return call
