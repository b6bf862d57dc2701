"""The command line: runs a command of `llmq.commands.catalog`.

Progress goes to stderr, results to stdout; `--json` prints one JSON object instead of text. Exit
codes: 0 done, 1 quality or verification failed, 2 bad usage or input, 130 interrupted, 141 when the
reader of stdout left (`llmq plan tiny | head -1`), as a shell reports it. Parsing imports neither
torch nor transformers, so `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llmq.commands.catalog import read_arguments
from llmq.errors import LlmqError, LlmqWarning
from llmq.messages import escaped, one_line
from llmq.schema import SCHEMA_KEY, SCHEMA_VERSION
from llmq.storage.boundary import out_of_memory


class _Stop:
    """SIGTERM and SIGINT as KeyboardInterrupt, remembered: raised inside a C extension, it can come
    out as another error (safetensors makes a ValueError of it)."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if (
                signal.getsignal(number) is not signal.SIG_IGN
            ):  # a shell starts its background jobs so
                signal.signal(number, self._raise)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        raise KeyboardInterrupt


@contextmanager
def _told_warnings() -> Iterator[list[str]]:
    """llmq's own warnings as lines on stderr and in the list; those of other packages as ever."""
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", LlmqWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            # A warning of the kernels is known by its module, which imports torch.
            is_own = issubclass(category, LlmqWarning)
            if is_own or category.__module__ == "llmq_kernels.core.errors":
                line = one_line(message)
                if line not in told:  # else of a model that is loaded more than once
                    told.append(line)
                    print(f"llmq: warning: {line}", file=sys.stderr)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield told


class _Stderr(io.TextIOBase):
    """A stream for progress and messages that gives up quietly: a disk that is full, or a reader
    that left, is no reason to lose a run, nor for another exit code than that of its result."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_terminal = bool(stream.isatty())  # where bars are drawn with escape sequences

    def write(self, text: str) -> int:
        shown = text if self._is_terminal else escaped(text, keep="\n\r\t")
        try:
            self._stream.write(shown)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            _discard(self._stream)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._is_terminal

    def fileno(self) -> int:
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)


def _discard(stream: Any) -> None:
    """Send what a stream still holds nowhere: it would be written, and fail again, when the
    interpreter ends, which makes its exit code 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def _fill_closed_streams() -> None:
    """Open what the caller closed (`2>&-`), or the next file that is opened would get its number
    and every message with it; Python has None for such a stream, and `print` takes that for
    stdout."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(descriptor)
                continue
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, the lowest free number


@contextmanager
def _safe_streams() -> Iterator[None]:
    """Streams that every message can be written to, for as long as a command runs."""
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of a file may hold what cannot be encoded
            stream.reconfigure(errors="backslashreplace")
    before, sys.stderr = sys.stderr, _Stderr(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = before


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    with _safe_streams():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(arguments: list[str]) -> int:
    try:
        args = read_arguments(arguments)
    except LlmqError as error:
        return _fail("--json" in arguments, str(error), error.exit_code)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # beside a bar of our own
    stop = _Stop()
    try:
        with _told_warnings() as told:
            answer = args.module.run(args)
        if answer is None:  # it is printed, or another of many processes answers
            return 0
        result, text = answer
        if told:
            result = {**result, "warnings": told}
        print(_as_json(result) if args.json else escaped(text, keep="\n\t"), flush=True)
    except (Exception, KeyboardInterrupt) as error:
        if stop.requested or isinstance(error, KeyboardInterrupt):
            return _fail(args.json, f"interrupted{_how_to_go_on(args)}", 130)
        if isinstance(error, BrokenPipeError):
            _discard(sys.stdout)
            return 141
        return _fail(args.json, *_explain(error), getattr(error, "details", {}))
    return 0


def _how_to_go_on(args: argparse.Namespace) -> str:
    """What to tell of a command that was interrupted."""
    if go_on := getattr(args, "go_on", ""):  # it had written its result
        return f"; {go_on}"
    if args.command in ("quantize", "qat"):
        return "; the same command continues where it stopped"
    return ""


def _explain(error: Exception) -> tuple[str, int]:
    """The message and the exit code of what the user can mend; anything else is a defect of ours
    and is raised again."""
    if isinstance(error, LlmqError):
        return str(error), error.exit_code
    if reason := out_of_memory(error):
        return reason, 2
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'input or output'}: {error.strerror or error}; check that it "
            "exists, may be used and has space left",
            2,
        )
    from llmq_kernels.core.errors import SettingError  # here, because it imports torch

    if isinstance(error, SettingError):
        return str(error), 2
    raise error


def _as_json(result: Mapping[str, Any]) -> str:
    """The object that `--json` prints, of a result or of an error."""
    return json.dumps({SCHEMA_KEY: SCHEMA_VERSION, **result})


def _fail(as_json: bool, message: str, code: int, details: Mapping[str, Any] = {}) -> int:
    line = one_line(message)
    print(f"llmq: {line}", file=sys.stderr)
    try:
        if as_json:
            print(_as_json({**details, "error": line}))
        sys.stdout.flush()
    except (OSError, ValueError):  # a full disk, which may be what the message is about
        _discard(sys.stdout)
    return code
