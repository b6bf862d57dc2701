"""`llmq sweep MODEL DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmq.commands import ladder_options, rendering
from llmq.commands.parser import Parser

HELP = (
    "Quantize a model in several ways and show divergence against size: a table, a page and a "
    "picture. What was measured already is not measured again."
)
EXAMPLES = (
    "llmq sweep tiny tiny-sweep --rung w4g128:gptq --rung w3g128:rtn",
    "llmq sweep Qwen/Qwen3-0.6B qwen3-sweep --plot qwen3.png",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help="a full-precision model, as llmq quantize takes it")
    parser.add_argument("out", metavar="DIR", help="where results go")
    parser.section("what is tried")
    parser.add_argument(
        "--rung",
        action="append",
        default=[],
        metavar="SPEC:METHOD",
        help="one of them, such as w3g64-asym:blockwise; can be given again (default: w8 to "
        "w2g64-asym by rtn and gptq)",
    )
    parser.add_argument("--plot", metavar="FILE", help="a picture (needs matplotlib)")
    ladder_options.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.benchmark.plot import check_plot
    from llmq.ladder import pareto
    from llmq.ladder.rungs import USUAL, read_rungs

    if args.plot:
        check_plot(args.plot)
    rungs = read_rungs(args.rung or list(USUAL))
    out = Path(args.out)
    bench = ladder_options.bench_of(args, out)
    points = [bench.measure(rung, ladder_options.say) for rung in rungs]
    title = f"{bench.source.name}: divergence against size"
    page, results = out / "sweep.html", out / "sweep.json"
    page.write_text(pareto.page(points, title), "utf-8")
    if args.plot:
        pareto.plot(points, title, Path(args.plot))
    found: dict[str, Any] = {
        "model": args.model,
        "data": args.data,
        **bench.windows.identity(),
        "points": [point.to_json() for point in points],
        "front": [str(point.rung) for point in pareto.front(points)],
        "page": str(page),
        "plot": args.plot,
    }
    results.write_text(json.dumps(found, indent=2))
    pairs = {"page": page, "figures": results, **({"plot": args.plot} if args.plot else {})}
    return found, f"{pareto.markdown(points)}\n{rendering.render_pairs(pairs)}"
