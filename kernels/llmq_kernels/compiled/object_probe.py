"""A child process that loads and runs what another process has just compiled, so that it is the
child that dies of it. Run by path, never imported: it knows the standard library and llvmlite.

Reads frames from stdin: the sizes of two parts (two uint32, little-endian), the arguments as JSON
and an object file. Loads the object, calls its function `kernel` once, and answers one line, "ok"
or what went wrong. An argument is a number, or "*" for the address of memory of its own. Whoever
does not answer within a minute, or is not asked anything for one, is ended by the system."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from typing import BinaryIO

SECONDS = 60
REGION_BYTES = 1 << 20  # of memory behind and before each address


def _prepare() -> None:
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform.startswith("linux") and os.uname().machine == "x86_64":
        ctypes.CDLL(None).syscall(158, 0x1023, 18)  # the tile registers, where there are any


def _arguments(wanted: list[int | str]) -> tuple[ctypes.Array[ctypes.c_int64], list[object]]:
    """The array of int64 that a kernel takes, its counter first, and the memory behind it."""
    regions: list[object] = []
    values = [0]
    for one in wanted:
        if one != "*":
            values.append(int(one))
            continue
        region = ctypes.create_string_buffer(2 * REGION_BYTES + 64)
        regions.append(region)
        values.append((ctypes.addressof(region) + REGION_BYTES + 63) // 64 * 64)
    return (ctypes.c_int64 * len(values))(*values), regions


def _run(wanted: list[int | str] | None, code: bytes) -> str:
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(binding.get_default_triple())
    machine = target.create_target_machine(codemodel="jitdefault", jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address("kernel")
    if not address:
        return "it has no function 'kernel'"
    if wanted is not None:
        array, _regions = _arguments(wanted)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(array))
    return "ok"


def _answer(source: BinaryIO, sink: BinaryIO) -> bool:
    if hasattr(signal, "alarm"):
        signal.alarm(SECONDS)
    head = source.read(8)
    if len(head) < 8:
        return False
    n_arguments, n_code = struct.unpack("<II", head)
    wanted, code = json.loads(source.read(n_arguments)), source.read(n_code)
    if hasattr(signal, "alarm"):
        signal.alarm(SECONDS)
    try:
        told = _run(wanted, code)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    sink.write(" ".join(told.split()).encode(errors="replace") + b"\n")
    sink.flush()
    return True


def main() -> None:
    sys.path.append(sys.argv[1])  # the folder that llvmlite is in
    _prepare()
    while _answer(sys.stdin.buffer, sys.stdout.buffer):
        pass


if __name__ == "__main__":
    main()
