"""`llmq eval MODEL`."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import common

HELP = "Perplexity of a model, quantized or not, with a 95 percent interval and what identifies the figure."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=common.MODEL_HELP)
    parser.add_argument(
        "--protocol",
        choices=("gptq",),
        default="gptq",
        help="gptq: disjoint windows, all but the first token of each scored",
    )
    common.add_evaluation_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.evaluation.perplexity import evaluate
    from llmq.formats.load import load
    from llmq.inference.head import quantize_head
    from llmq.inference.module import backends_in_use
    from llmq.models.source import Source
    from llmq.storage.boundary import running

    common.check_device(args.device)
    source = Source.open(args.model, args.revision)
    verified = common.check_manifest(args, source.folder)
    windows = common.evaluation_windows(args, source)
    model = load(
        source,
        dtype=args.dtype,
        device=args.device,
        compute=args.compute,
        strict=args.strict,
    )
    quantize_head(model, args.head_bits)
    with common.progress("windows") as show, running(args.model):
        result = evaluate(model, windows, show)
    summary = {
        "model": args.model,
        "data": args.data,
        **result.to_json(),
        **common.conditions(args),
        "backends": backends_in_use(model),
        "verified": verified,
    }
    return (
        summary,
        f"perplexity {result.value:.4f}  ({common.render_interval(summary['ci95'], '.4f')}; "
        f"{common.render_conditions(summary)})",
    )
