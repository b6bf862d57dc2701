"""`llmq verify CHECKPOINT`."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import rendering
from llmq.commands.parser import Parser

HELP = (
    "Check every file of a folder that llmq wrote against the hashes of its manifest. Exit code 1 "
    "when one differs."
)

EXAMPLES = ("llmq verify tiny-w4",)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="a folder that llmq wrote, or a Hub id of one")
    parser.section("where it is")
    parser.add_argument("--revision", help="revision of a Hub model")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text. Raises `VerificationError` for a folder that is not
    as it was written."""
    from pathlib import Path

    from llmq.errors import VerificationError
    from llmq.models.hub import resolve
    from llmq.storage.manifest import check_hashes, has_manifest

    folder = Path(args.checkpoint)
    # a config.json may be what is missing
    model_dir = folder if has_manifest(folder) else resolve(args.checkpoint, args.revision)
    verdict = check_hashes(model_dir)
    result = {"model": args.checkpoint, "good": verdict.is_good, **verdict.to_json()}
    if not verdict.is_good:
        raise VerificationError(f"{args.checkpoint}: {verdict.describe()}", details=result)
    pairs: dict[str, object] = {
        "verified": f"{args.checkpoint}: {len(verdict.ok)} of {verdict.n_files} files are as llmq "
        "wrote them",
        "seconds": f"{verdict.seconds:.1f}",
    }
    if verdict.edited:
        pairs["edited since"] = ", ".join(verdict.edited)
    if verdict.absent:
        pairs["left behind"] = ", ".join(verdict.absent)
    if verdict.extra:
        pairs["not by llmq"] = ", ".join(verdict.extra)
    return result, rendering.render_pairs(pairs)
