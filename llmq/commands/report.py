"""`llmq report CKPT`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import compare, options, rendering
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.reports.page import Sample

HELP = (
    "Write a page with pictures about a quantized model: what was lost, the error of each layer, "
    "where the bytes are. With --base it is compared again, and both models write."
)
EXAMPLES = (
    "llmq report tiny-w4",
    "llmq report tiny-w4 --base tiny --max-windows 20",
    "llmq report tiny-w4 --base tiny --prompt 'def main():' --out tiny-w4.html",
)
PROMPTS = (
    "The house at the end of the street had been empty since",
    "Water boils at a lower temperature on a mountain because",
    'def is_prime(n):\n    """Whether n is a prime number."""\n',
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="a folder that llmq wrote")
    parser.section("what the page shows")
    parser.add_argument(
        "--base", metavar="MODEL", help="the full-precision model, to compare with and to write"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what both models go on from; can be given again (default: three of llmq's)",
    )
    parser.more.add_argument(
        "--max-new-tokens",
        type=options.whole(0),
        default=48,
        metavar="N",
        help="tokens that each writes; 0 for no texts (default: 48)",
    )
    parser.more.add_argument(
        "--out", metavar="FILE", help="where the page goes (default: report.html in the folder)"
    )
    options.add_evaluation_arguments(parser)
    parser.set_defaults(protocol="gptq", stride=None, choices=None)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.models.source import Source
    from llmq.reports.page import PAGE, Sample, log_of, report_of, write

    folder = Source.open(args.checkpoint).folder
    report = report_of(folder)
    comparison, samples = None, list[Sample]()
    if args.base is not None:
        args.quant = args.checkpoint
        comparison = compare.measured(args)
        samples = _samples(args)
    page = folder / PAGE if args.out is None else Path(args.out)
    write(page, report, comparison=comparison, samples=samples, log=log_of(folder))
    result = {
        "checkpoint": args.checkpoint,
        "page": str(page),
        "comparison": comparison,
        "samples": [vars(sample) for sample in samples],
    }
    pairs: dict[str, object] = {"page": page}
    if comparison is None:
        pairs["not on it"] = "a comparison and texts of both models; --base MODEL adds them"
    return result, rendering.render_pairs(pairs)


def _samples(args: argparse.Namespace) -> list[Sample]:
    """What both models write, one model in memory at a time."""
    from llmq.api.generation import generate
    from llmq.formats.load import load
    from llmq.inference.decoding import prepare_decoding
    from llmq.models.source import Source
    from llmq.reports.page import Sample

    prompts = args.prompt or list(PROMPTS)
    if not args.max_new_tokens:
        return []
    written: list[list[str]] = []
    for name, revision in ((args.base, args.revision), (args.checkpoint, None)):
        source = Source.open(name, revision)
        model = prepare_decoding(load(source, device=args.device, compute=args.compute))
        tokenizer = source.tokenizer
        texts = [
            generate(model, prompt, args.max_new_tokens, tokenizer=tokenizer) for prompt in prompts
        ]
        written.append(texts)
    return [Sample(*each) for each in zip(prompts, *written, strict=True)]
