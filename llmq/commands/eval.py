"""`llmq eval MODEL`."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import options, rendering, scoring
from llmq.commands.parser import Parser

HELP = (
    "Perplexity of a model, quantized or not, with a 95 percent interval and what identifies the "
    "figure."
)

EXAMPLES = (
    "llmq eval tiny --max-windows 20",
    "llmq eval tiny-w4 --data my-text.jsonl",
    "llmq eval tiny-w4 --data Salesforce/wikitext:wikitext-2-raw-v1:test",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help=options.MODEL_HELP)
    parser.section("text")
    parser.more.add_argument(
        "--protocol",
        choices=("gptq",),
        default="gptq",
        help="gptq: disjoint windows, all but the first token of each scored",
    )
    options.add_evaluation_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.evaluation.perplexity import evaluate
    from llmq.formats.load import load
    from llmq.inference.head import quantize_head
    from llmq.inference.module import backends_in_use
    from llmq.models.source import Source
    from llmq.storage.boundary import running

    options.check_device(args.device)
    source = Source.open(args.model, args.revision)
    verified = scoring.check_manifest(args, source.folder)
    windows = scoring.evaluation_windows(args, source)
    model = load(
        source,
        dtype=args.dtype,
        device=args.device,
        compute=args.compute,
        strict=args.strict,
    )
    quantize_head(model, args.head_bits)
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
    interval = rendering.render_interval(summary["ci95"], ".4f")
    text = f"perplexity {result.value:.4f}  ({interval}; {rendering.render_conditions(summary)})"
    return summary, rendering.wrapped(text, rendering.terminal_width(), "  ")
