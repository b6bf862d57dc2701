"""`llmq export CHECKPOINT OUT --format F`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import options, pushing, rendering
from llmq.commands.engine_lines import engine_lines
from llmq.commands.parser import Parser
from llmq.formats.exporters import FORMATS

if TYPE_CHECKING:
    from llmq.formats.changes import ExportReport

HELP = (
    "Write a quantized folder in another format: with the same values bit for bit, or not at all. "
    "An interrupted run into a folder continues when the same command is given again."
)

EXAMPLES = (
    "llmq export tiny-w4 tiny-gptq --format gptq",
    "llmq export tiny-w4 tiny-awq --format awq --allow-requantize",
    "llmq export qwen3-w4 qwen3-w4.gguf --format gguf",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="a quantized folder, or a Hub id of one")
    parser.add_argument("out", help="the folder to write, or the .gguf file")
    parser.section("what is written")
    parser.add_argument("--format", required=True, metavar="F", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        help="round layers anew that the format cannot hold exactly, and show the error",
    )
    parser.section("run and output")
    options.add_overwrite_argument(parser)
    pushing.add_push_arguments(parser)
    parser.section("where it is")
    parser.add_argument("--revision", help="revision of a Hub model")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.formats.exporters import export_as
    from llmq.models.source import Source

    pushing.check_push(args)
    with rendering.progress("parts") as show:
        report = export_as(
            Source.open(args.checkpoint, args.revision),
            Path(args.out),
            args.format,
            allow_requantize=args.allow_requantize,
            overwrite=args.overwrite,
            on_part=show,
        )
    pushed, lines = pushing.push_result(args)
    return {**report.to_json(), **pushed}, _text(report, lines)


def _text(report: ExportReport, lines: dict[str, object]) -> str:
    """lines: about what was pushed."""
    pairs: dict[str, object] = {
        "written": f"{report.out} ({report.format} format, from "
        f"{report.source_format or 'full precision'})",
        "card": report.card,
        "layers": _exactness(report),
        "weight files": f"{report.source_bytes / 1e6:.1f} MB -> {report.stored_bytes / 1e6:.1f} MB",
        "tensors": ", ".join(f"{count} x {name}" for name, count in report.types.items()),
    }
    kinds = {(each.before, each.after) for each in report.layers if each.before != each.after}
    if kinds:
        pairs["stored as"] = ", ".join(f"{before} -> {after}" for before, after in sorted(kinds))
    if worst := max(report.requantized, key=lambda each: each.error, default=None):
        pairs["rounded anew"] = (
            f"{len(report.requantized)} layers, by at most {worst.error:.2%} of the weights' norm "
            f"({worst.name}: {worst.reason}); measure the result with llmq compare"
        )
    if report.left_out:
        pairs["left out"] = (
            f"{len(report.left_out)} tensors that decide nothing: {report.left_out[0]}"
        )
    for i, note in enumerate(report.notes):
        pairs["note" if not i else f"note {i + 1}"] = note
    pairs |= lines
    engines = [reading.to_json() for reading in report.engines]
    return f"{rendering.render_pairs(pairs)}\n{engine_lines(engines)}"


def _exactness(report: ExportReport) -> str:
    n_exact = len(report.layers) - len(report.requantized)
    return f"{n_exact} of {len(report.layers)} have the values that they had, bit for bit"
