"""`llmq eval MODEL`."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import options, rendering, scoring, task_scores
from llmq.commands.parser import Parser
from llmq.evaluation.protocols import PROTOCOLS

HELP = (
    "Perplexity of a model, quantized or not, with a 95 percent interval and what identifies the "
    "figure; or its scores on tasks of lm-eval."
)

EXAMPLES = (
    "llmq eval tiny --max-windows 20",
    "llmq eval tiny-w4 --data my-text.jsonl",
    "llmq eval tiny-w4 --data Salesforce/wikitext:wikitext-2-raw-v1:test",
    "llmq eval tiny-w4 --protocol strided --stride 256",
    "llmq eval tiny-w4 --tasks hellaswag,./mytask.yaml --limit 200",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.section("text")
    parser.more.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="gptq",
        metavar="PROTOCOL",
        help=f"{'; '.join(f'{name}: {what}' for name, what in PROTOCOLS.items())} (default: gptq)",
    )
    parser.more.add_argument(
        "--stride",
        type=options.whole(1),
        metavar="S",
        help="tokens from one window to the next, of --protocol strided (default: 512, or half a "
        "window where that is less)",
    )
    options.add_evaluation_arguments(parser)
    task_scores.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    options.check_device(args.device)
    task_scores.check_options(args)
    return task_scores.run(args) if args.tasks else _perplexity(args)


def _perplexity(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from llmq.evaluation.perplexity import evaluate
    from llmq.inference.module import backends_in_use
    from llmq.models.source import Source
    from llmq.storage.boundary import running

    source = Source.open(args.model, args.revision)
    verified = scoring.check_manifest(args, source.folder)
    windows = scoring.evaluation_windows(args, source)
    model = scoring.load_scored(args, source)
    with rendering.progress("windows") as show, running(args.model):
        show(0, len(windows.tokens))
        result = evaluate(model, windows, show)
    summary = {
        "model": args.model,
        "data": args.data,
        **result.to_json(),
        **scoring.conditions(args),
        "backends": backends_in_use(model),
        "verified": verified,
    }
    return summary, rendering.wrapped(_text(summary), rendering.terminal_width(), "  ")


def _text(summary: dict[str, Any]) -> str:
    name = "perplexity" if summary["unit"] == "token" else f"{summary['unit']} perplexity"
    drawn = "document" if "documents" in summary else "window"
    is_one = summary.get("documents", summary["windows"]) == 1
    parts = []
    if is_one or summary["ci95"] is not None:  # else beyond what a float holds
        parts.append(rendering.render_interval(summary["ci95"], ".4f", drawn))
    if summary["unit"] != "token":
        parts.append(f"{summary['token_perplexity']:.4f} per token")
    if summary["bits_per_byte"] is not None:
        parts.append(f"{summary['bits_per_byte']:.4f} bits per byte")
    parts.append(rendering.render_conditions(summary))
    value = summary["perplexity"]
    shown = "beyond 1e307" if value is None else f"{value:.4f}"
    return f"{name} {shown}  ({'; '.join(parts)})"
