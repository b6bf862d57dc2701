"""The command line. Each command is a module of `llmq.commands` with `HELP`, `add_arguments(parser)` and `run(args) -> (JSON-able result, text)`.

Progress goes to stderr, results to stdout; `--json` prints one JSON object instead of text. Exit codes: 0 done, 1 quality or verification failed, 2 bad usage or input,
130 interrupted. Parsing imports neither torch nor transformers, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from types import FrameType

from llmq import __version__
from llmq.errors import LlmqError

COMMANDS = ("plan", "quantize", "qat", "eval", "compare", "generate", "inspect", "bench", "doctor")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmq", description="Quantize Hugging Face causal language models, with proof of what was lost.")
    parser.add_argument("--version", action="version", version=f"llmq {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"llmq.commands.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP.splitlines()[0], description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object")
        subparser.set_defaults(module=module)
    return parser


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    try:
        result, text = args.module.run(args)
    except LlmqError as error:
        return _fail(args.json, str(error), error.exit_code)
    except KeyboardInterrupt:
        hint = "; the same command continues where it stopped" if args.command in ("quantize", "qat") else ""
        return _fail(args.json, f"interrupted{hint}", 130)
    except ValueError as error:
        from llmq_kernels.errors import SettingError  # here, because it imports torch

        if not isinstance(error, SettingError):
            raise
        return _fail(args.json, str(error), 2)
    except OSError as error:
        return _fail(args.json, f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    print(json.dumps(result) if args.json else text)
    return 0


def _fail(as_json: bool, message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"llmq: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": line}))
    return code
