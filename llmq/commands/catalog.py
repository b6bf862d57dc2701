"""The commands there are. A command is a module of `llmq.commands` with `HELP`, `EXAMPLES` (command
lines), `add_arguments(parser)` and `run(args) -> (JSON-able result, text)`, or None; and one line
here. No module is imported before its command is asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence

from llmq import __version__
from llmq.commands.parser import Parser
from llmq.errors import LlmqError
from llmq.messages import did_you_mean

PURPOSE = "Quantize Hugging Face causal language models, with proof of what was lost."
GROUPS = {
    "make a smaller model": {
        "plan": "what quantize would do: layers, size, memory, time",
        "quantize": "quantize a model into a folder",
        "qat": "fine-tune a model through its quantizer",
        "export": "write a quantized model in another format",
        "push": "put a result with its card onto the Hub",
    },
    "measure it": {
        "eval": "perplexity of a model, with its interval",
        "compare": "how far a quantized model is from its base",
        "report": "a page with pictures about a quantized model",
        "sweep": "divergence against size for several ways to quantize a model",
        "advise": "the smallest way to quantize a model within a bound on the loss",
        "bench": "how fast this machine multiplies packed weights",
    },
    "use it": {
        "generate": "let a model answer a prompt",
        "chat": "talk to a model",
    },
    "look into things": {
        "inspect": "what is stored in a model folder, and how it was made",
        "verify": "check a folder against the hashes of its manifest",
        "doctor": "versions, devices, and the backends that work here",
        "completion": "a script that lets bash or zsh complete commands",
    },
}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)
EXAMPLES = (
    "llmq quantize tiny tiny-w4            # the bundled model, to 4 bits",
    "llmq compare tiny tiny-w4             # what it cost",
    "llmq generate tiny-w4 --prompt 'def main():'",
    "llmq quantize --help                  # what most people need of a command",
    "llmq quantize --help-all              # everything",
)


def build_parser(names: Iterable[str] = COMMANDS) -> Parser:
    """The parser of a command line with one of these commands."""
    parser = _Top(prog="llmq", description=PURPOSE, examples=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"llmq {__version__}")
    parser.add_help_options()
    subparsers = parser.add_subparsers(dest="command", parser_class=Parser)
    for name in names:
        module = importlib.import_module(f"llmq.commands.{name}")
        examples = getattr(module, "EXAMPLES", ())
        command = subparsers.add_parser(name, description=module.HELP, examples=examples)
        module.add_arguments(command)
        command.section("general")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_help_options()
        command.set_defaults(module=module, parser=command)
    return parser


def command_parsers() -> dict[str, Parser]:
    """The parser of every command, by its name."""
    (choices,) = (a.choices for a in build_parser()._actions if a.dest == "command")
    assert isinstance(choices, dict)
    return choices


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line. Prints help and leaves where it is asked for, or where
    nothing is. Raises `LlmqError` for bad usage."""
    name = next((text for text in arguments if not text.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise LlmqError(
            f"unknown command {name}{did_you_mean(name, COMMANDS)}; 'llmq --help' lists them"
        )
    parser = build_parser(() if name is None else (name,))
    if not arguments:
        parser.print_help()
        parser.exit()
    if name is None:
        parser.check_options(arguments)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # told by the command's own parser, whose help lists what there is
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if name is None:
        parser.error("a command is missing")
    return args


class _Top(Parser):
    """Lists the commands by what they are for."""

    def format_help(self) -> str:
        width = max(map(len, COMMANDS)) + 2
        lines = ["usage: llmq COMMAND [options]", "", PURPOSE]
        for title, commands in GROUPS.items():
            lines += ["", f"{title}:"]
            lines += [f"  {name.ljust(width)}{what}" for name, what in commands.items()]
        lines += ["", "options:"]
        lines += [f"  {'-h, --help'.ljust(width)}show this and exit"]
        lines += [f"  {'--version'.ljust(width)}show the version and exit"]
        return "\n".join([*lines, "", self._shown_examples(), ""])
