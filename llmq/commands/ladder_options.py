"""What `sweep` and `advise` have in common: the text they measure on, and how rungs are made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import options, scoring
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.ladder.bench import Bench


def add_arguments(parser: Parser) -> None:
    parser.section("text that is measured on")
    parser.add_argument(
        "--data",
        type=options.source,
        default="bundled",
        metavar="SOURCE",
        help=f"{options.TEXT_HELP} (default)",
    )
    parser.add_argument(
        "--sequence-length",
        type=options.whole(2),
        metavar="T",
        help="tokens per window (default: 2048, or what the model has positions for)",
    )
    parser.add_argument(
        "--max-windows",
        type=options.whole(1),
        metavar="N",
        help="the first N windows only (default: as of llmq compare)",
    )
    parser.section("how models are quantized")
    parser.add_argument(
        "--calibration",
        type=options.source,
        metavar="SOURCE",
        help="calibration text (default: as of llmq quantize)",
    )
    parser.add_argument(
        "--samples",
        type=options.whole(1),
        metavar="N",
        help="its windows (default: as of quantize)",
    )
    parser.more.add_argument(
        "--calibration-length",
        type=options.whole(2),
        metavar="T",
        help="tokens of each of them (default: as of quantize)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.more.add_argument(
        "--keep",
        action="store_true",
        help="the folders of all rungs (default: their figures, and what advise recommends)",
    )
    options.add_revision_argument(parser)


def bench_of(args: argparse.Namespace, work_dir: Path) -> Bench:
    """The model and its text."""
    from llmq.ladder.bench import Bench
    from llmq.models.source import Source

    options.check_device(args.device)
    source = Source.open(args.model, args.revision)
    args.bos, args.protocol, args.stride = "auto", "gptq", None
    windows = scoring.evaluation_windows(args, source)
    given: dict[str, Any] = {
        "calibration": args.calibration,
        "samples": args.samples,
        "sequence_length": args.calibration_length,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    work_dir.mkdir(parents=True, exist_ok=True)
    return Bench(source, windows, work_dir, chosen, args.device, args.keep)


def say(text: str) -> None:
    """Progress, where people see it."""
    print(text, file=sys.stderr, flush=True)
