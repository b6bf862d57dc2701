"""`llmq advise MODEL --max-loss 1%`."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import ladder_options, options, rendering
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.ladder.advice import Advice
    from llmq.ladder.bench import Bench
    from llmq.ladder.rungs import Rung

HELP = (
    "The smallest way to quantize a model within a bound on what is lost: rungs are tried from "
    "large to small and from cheap to dear, measured on one text, and the first size that no "
    "method can hold ends it."
)
EXAMPLES = (
    "llmq advise tiny --max-loss 1% --samples 32",
    "llmq advise Qwen/Qwen3-0.6B --max-loss 5% --data my-text.txt",
)


def share(text: str) -> float:
    """A share: 1%, or .01."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"expected a share above 0, such as 1% or .01, got {text!r}"
        )
    return value


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", help="a full-precision model, as llmq quantize takes it")
    parser.section("what is asked for")
    parser.add_argument(
        "--max-loss",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="most that perplexity may rise, such as 1%% (default), the upper end of its interval",
    )
    parser.add_argument(
        "--methods",
        default="rtn,gptq,blockwise",
        help="that may be used, from cheap to dear (default: rtn,gptq,blockwise)",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="where figures are kept, for a run that goes on (default: MODEL-advice here)",
    )
    parser.more.add_argument(
        "--qat-steps",
        type=options.whole(0),
        default=0,
        metavar="N",
        help="also train the size that failed for N steps, and say whether that brings it within "
        "the bound (default: 0, not tried)",
    )
    parser.more.add_argument(
        "--train",
        default="bundled",
        metavar="SOURCE",
        help="the text for that, as llmq qat takes it (default: bundled)",
    )
    ladder_options.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.ladder.advice import advise
    from llmq.ptq.methods import method_named

    methods = [name.strip() for name in args.methods.split(",")]
    for name in methods:
        method_named(name)
    work_dir = Path(args.work_dir or f"{Path(args.model).name}-advice")
    bench = ladder_options.bench_of(args, work_dir)
    keeping = replace(bench, keep=True)  # the folder of the best is what was asked for
    others = {path.name for path in work_dir.iterdir()}  # of other runs

    def drop(rung: Rung) -> None:
        if not args.keep and rung.folder_name not in others:
            bench.remove(rung)

    advice = advise(
        lambda rung: keeping.measure(rung, ladder_options.say),
        args.max_loss,
        methods,
        drop=drop,
    )
    trained = _trained(args, bench, advice)
    best = None if advice.best is None else advice.best.rung
    is_there = best is not None and bench.finished_in(best) is not None
    found: dict[str, Any] = {
        "model": args.model,
        "data": args.data,
        "max_loss": args.max_loss,
        **bench.windows.identity(),
        "points": [point.to_json() for point in advice.points],
        "recommended": None if advice.best is None else str(advice.best.rung),
        "next_smaller": None if advice.failed is None else str(advice.failed.rung),
        "not_tried": advice.left,
        "qat": trained,
        "folder": str(bench.folder_of(best)) if best is not None and is_there else None,
        "command": _command(args, advice),
    }
    return found, _text(args, advice, found)


def _trained(args: argparse.Namespace, bench: Bench, advice: Advice) -> dict[str, Any] | None:
    """What a short training makes of the size that failed."""
    if not args.qat_steps or advice.failed is None:
        return None
    from llmq.ladder.training import train

    ladder_options.say(f"{advice.failed.rung.spec}: training for {args.qat_steps} steps")
    return train(bench, advice.failed, args.max_loss, args.qat_steps, args.train).to_json()


def _command(args: argparse.Namespace, advice: Advice) -> str | None:
    """What makes the recommended model."""
    if advice.best is None:
        return None
    from llmq.grid.scheme import parse_treatment

    rung = advice.best.rung
    spec, _ = parse_treatment(rung.spec)
    words = [f"llmq quantize {args.model} OUT --method {rung.method}"]
    words.append(f"--bits {spec.code.removeprefix('int')} --group-size {spec.group_size}")
    words += [] if spec.symmetric else ["--asymmetric"]
    given = {
        "--calibration": args.calibration,
        "--samples": args.samples,
        "--sequence-length": args.calibration_length,
    }
    if rung.method != "rtn":
        words += [f"{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(words)


def _text(args: argparse.Namespace, advice: Advice, found: dict[str, Any]) -> str:
    from llmq.ladder import pareto

    pairs: dict[str, object] = {}
    if advice.best is None:
        pairs["recommended"] = f"nothing that was tried loses at most {args.max_loss:.3g}"
    else:
        pairs["recommended"] = f"{advice.best.rung}, {advice.best.n_bytes / 1e6:.1f} MB"
        if found["folder"]:
            pairs["folder"] = found["folder"]
        pairs["command"] = found["command"]
    if advice.failed is not None:
        pairs["next smaller"] = (
            f"{advice.failed.rung} loses {advice.failed.loss:.2%}, up to {advice.failed.most:.2%}"
        )
    for name, reason in advice.left.items():
        pairs[f"not tried: {name}"] = reason
    if (qat := found["qat"]) is not None:
        pairs["training"] = qat["remark"]
    elif advice.failed is not None:
        pairs["training"] = (
            f"not tried; --qat-steps N trains {advice.failed.rung.spec} for a while and says "
            "whether that would hold the bound"
        )
    return f"{pareto.markdown(advice.points)}\n{rendering.render_pairs(pairs)}"
