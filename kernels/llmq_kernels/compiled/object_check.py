"""Whether a freshly compiled object runs, found out in a child process (`object_probe`).

One child judges all objects of a process: it starts in an eighth of a second, imports llvmlite and
no torch, takes some milliseconds per object and ends a minute after the last one. An object counts
as deadly when two children in a row do not answer."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

# What numbers are in the probe's call: each of memory's regions is large enough for them.
_ONE, _COLUMNS = 1, 128
_IN_COLUMNS = ("k", "span", "group", "columns_per_group")
ARGUMENTS_MARK = "; arguments:"  # a comment of LLVM's, which `Emitter.finish` writes


def probe_arguments(text: str) -> list[int | str] | None:
    """The arguments of the probe's call of a kernel, by the comment in its text: "*" for an
    address; None where it has no such comment, and is loaded only."""
    first = text.split("\n", 1)[0]
    if not first.startswith(ARGUMENTS_MARK):
        return None
    values: list[int | str] = []
    for name in first.removeprefix(ARGUMENTS_MARK).split():
        number = _COLUMNS if name in _IN_COLUMNS else _ONE
        values.append("*" if name.endswith("*") else number)
    return values


class _Child:
    """One running `object_probe`."""

    def __init__(self) -> None:
        import llvmlite

        packages = Path(llvmlite.__file__).resolve().parent.parent
        program = Path(__file__).with_name("object_probe.py")
        # Isolated: neither the working folder nor PYTHON* variables say what it imports.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), str(packages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=packages,
        )
        self.owner = os.getpid()

    def ask(self, frame: bytes) -> str:
        """Its answer, empty when it died."""
        source, sink = self.process.stdout, self.process.stdin
        assert source is not None
        assert sink is not None
        with suppress(OSError):
            sink.write(frame)
            sink.flush()
            return source.readline().decode(errors="replace").strip()
        return ""

    def end(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_lock = threading.Lock()
_child: _Child | None = None


def _ask(frame: bytes) -> tuple[str, int]:
    """The answer of the child, and how it ended where there is none."""
    global _child
    if _child is None or _child.owner != os.getpid() or _child.process.poll() is not None:
        _child = _Child()
    if answer := _child.ask(frame):
        return answer, 0
    status, _child = _child.end(), None
    return "", status


def close() -> None:
    """End the child, if there is one."""
    global _child
    with _lock:
        if _child is not None and _child.owner == os.getpid():
            _child.end()
        _child = None


def refusal(code: bytes, text: str) -> str | None:
    """Why an object, compiled from `text`, cannot be loaded and called here, or None. Raises
    `OSError` where no child can be started."""
    arguments = json.dumps(probe_arguments(text)).encode()
    frame = struct.pack("<II", len(arguments), len(code)) + arguments + code
    with _lock:
        for _ in range(2):  # the first may have been ended by somebody else, or by its own alarm
            answer, status = _ask(frame)
            if answer:
                return None if answer == "ok" else answer
    return (
        f"a probe of it was ended by signal {-status}"
        if status < 0
        else (f"a probe of it ended with status {status}")
    )
