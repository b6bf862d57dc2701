"""`llmq push FOLDER USER/NAME`."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import pushing, rendering
from llmq.commands.parser import Parser

HELP = (
    "Push a folder that llmq wrote, or a .gguf file, to the Hub, with its model card. Files are "
    "checked first. An interrupted upload continues when the same command is given again."
)

EXAMPLES = (
    "llmq push qwen3-w4 me/qwen3-w4            # private",
    "llmq push qwen3-w4.gguf me/qwen3-w4-gguf --public",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", help="a folder that llmq wrote, or a .gguf file")
    parser.add_argument("repository", metavar="USER/NAME", help="where it goes on the Hub")
    parser.section("who sees it")
    pushing.add_public_argument(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text. Raises `LlmqError` with the command that goes
    on."""
    pushed = pushing.push_with_hint(args, args.folder, args.repository)
    return pushed.to_json(), rendering.render_pairs(pushing.lines(pushed))
