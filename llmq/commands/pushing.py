"""`--push-to`: what a command has written goes onto the Hub."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llmq.commands.parser import Parser
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from llmq.cards.upload import Pushed


def add_push_arguments(parser: Parser) -> None:
    """Where the result goes beside its folder."""
    parser.more.add_argument(
        "--push-to",
        metavar="USER/NAME",
        help="push the result to this repository on the Hub, which is made where there is none, "
        "with the model card; 'llmq push' does it later",
    )
    add_public_argument(parser.more)


def add_public_argument(parser: Any) -> None:
    """Who sees what is pushed."""
    parser.add_argument(
        "--public",
        action="store_true",
        help="everybody sees the repository (default: its owner alone)",
    )


def check_push(args: argparse.Namespace) -> None:
    """Raise `LlmqError`, before anything is computed, where the result could not be pushed."""
    if args.push_to is None:
        if args.public:
            raise LlmqError("--public: is about what is pushed; give --push-to USER/NAME, too")
        return
    from llmq.cards.upload import check_destination

    try:
        check_destination(args.push_to)
    except LlmqError as error:
        raise LlmqError(f"--push-to {error}") from None


def push_result(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, object]]:
    """Push what a command wrote to `args.out`, where that was asked for: keys for its JSON, and
    lines for its text. Raises `LlmqError` with the command that goes on."""
    if args.push_to is None:
        return {}, {}
    try:
        pushed = push_with_hint(args, args.out, args.push_to)
    except LlmqError as error:
        raise LlmqError(f"{args.out} is written; {error}") from error
    return {"pushed": pushed.to_json()}, lines(pushed)


def push_with_hint(args: argparse.Namespace, path: str, repo_id: str) -> Pushed:
    """`llmq.push`. Who interrupts it is told how to go on."""
    from llmq.api.pushing import again_with, push

    again = again_with(path, repo_id, private=not args.public)
    args.go_on = f"{path} is written, and '{again}' goes on with pushing it"
    return push(path, repo_id, private=not args.public)


def lines(pushed: Pushed) -> dict[str, object]:
    """What is on the Hub, for the text of a command."""
    who = "private" if pushed.private else "public"
    found: dict[str, object] = {
        "pushed": f"{len(pushed.files)} files to {pushed.url} ({who})",
        "commit": pushed.commit_url,
    }
    if "README.md" not in pushed.files:
        found["model card"] = "none, for there is none here"
    if pushed.left_behind:
        found["not pushed"] = f"{', '.join(pushed.left_behind)}: not written by llmq"
    return found
