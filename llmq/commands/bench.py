"""`llmq bench`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.commands import options, rendering
from llmq.commands.options import real, whole
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.benchmark.kernels import Kind

HELP = (
    "Time the packed kernels beside torch's bfloat16 linear on this machine (--kernels, the "
    "default), or decoding with a synthetic Llama (--decode)."
)

EXAMPLES = (
    "llmq bench",
    "llmq bench --shapes 4096x4096 --rows 1 8 --weights w4g128 w8+a8",
    "llmq bench --decode                   # needs a GPU",
)


def add_arguments(parser: Parser) -> None:
    parser.section("what is timed")
    parser.add_argument(
        "--kernels", action="store_true", help="products of single layers (default)"
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="tokens per second of a synthetic Llama-3-8B-shaped model, bfloat16 and quantized; "
        "needs a GPU",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NxK",
        help="outputs x inputs of the layers (default: Llama-3-8B's and two squares on a GPU, "
        "4096x4096 on a CPU)",
    )
    parser.add_argument("--rows", nargs="+", type=whole(1), metavar="M", help="rows of x")
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="SPEC",
        help="such as w4g128, w3g64-asym, w8; +a8 for INT8 activations, +a8g for those of "
        "--compute int8: w8+a8, ternary+a8g",
    )
    parser.section("how it is timed")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.more.add_argument(
        "--repeats",
        type=whole(1),
        default=20,
        metavar="N",
        help="measurements of which the median is taken (default: 20)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first measure the candidate tiles of every kernel and keep the fastest in "
        "~/.cache/llmq; needs a GPU",
    )
    parser.more.add_argument(
        "--tune-seconds",
        type=real(),
        default=240,
        metavar="S",
        help="time for --tune (default: 240)",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw the ratios; needs matplotlib")


def _shapes(texts: list[str]) -> list[tuple[int, int]]:
    from llmq.errors import LlmqError

    shapes = []
    for text in texts:
        n, _, k = text.lower().partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0):
            raise LlmqError(f"--shapes {text}: expected outputs x inputs, such as 4096x4096")
        shapes.append((int(n), int(k)))
    return shapes


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    import torch

    from llmq.errors import LlmqError

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options.check_device(str(device))
    for option in ("decode", "tune"):
        if getattr(args, option) and device.type != "cuda":
            raise LlmqError(
                f"--{option} needs a CUDA device, and none is here; 'llmq bench --kernels' times "
                "this machine's CPU kernels"
            )
    environment = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if args.decode:
        from llmq.benchmark.decode import compare_decode

        result = environment | compare_decode(device)
        return result, rendering.render_pairs(result)
    return _kernels(args, device, environment)


@dataclass(frozen=True)
class _Plan:
    """What is measured: shapes of layers `(N, K)`, rows of x, and kinds of weights."""

    shapes: list[tuple[int, int]]
    rows: list[int]
    kinds: list[Kind]

    @property
    def n_cases(self) -> int:
        return len(self.shapes) * len(self.rows) * len(self.kinds)


def _plan(args: argparse.Namespace, is_on_gpu: bool) -> _Plan:
    """That of the options, with the defaults of the device."""
    from llmq.benchmark import kernels

    shapes = list(kernels.GPU_SHAPES if is_on_gpu else kernels.CPU_SHAPES)
    rows = list(kernels.GPU_ROWS if is_on_gpu else kernels.CPU_ROWS)
    weights = list(kernels.GPU_WEIGHTS if is_on_gpu else kernels.CPU_WEIGHTS)
    kinds = [kernels.Kind(text) for text in args.weights or weights]
    for kind in kinds:
        kind.spec.fit(1)  # reads the text now: a mistake should not come after minutes of tuning
    if args.shapes:
        shapes = _shapes(args.shapes)
    return _Plan(shapes, args.rows or rows, kinds)


def _kernels(
    args: argparse.Namespace, device: Any, environment: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    from llmq.benchmark import kernels, plot

    if args.plot:
        plot.check_plot(args.plot)
    plan = _plan(args, device.type == "cuda")
    result: dict[str, Any] = dict(environment)
    if args.tune:
        from llmq.benchmark import tuner
        from llmq_kernels.triton import choices, tuning

        report = tuner.tune(plan.shapes, plan.rows, plan.kinds, device, args.tune_seconds)
        result["tuning_seconds"] = report.seconds
        result["tuning_refused"] = report.refused
        result["tuning_not_reached"] = report.not_reached
        chip = choices.chip_of(device)
        tuning.save(chip, tuning.tuned_dir() / f"{tuning.slug(chip.name)}.json", environment)
    table = []
    with rendering.progress("bench") as show:
        show(0, plan.n_cases)
        for row in kernels.measure(
            plan.shapes, plan.rows, plan.kinds, device, repeats=args.repeats
        ):
            table.append(row)
            remark = f"{row['n']}x{row['k']} {row['weights']} M={row['m']}: {row['ratio']:.2f}"
            show(len(table), plan.n_cases, remark)
    result["rows"] = table
    if args.plot:
        plot.ratios(table, args.plot)
    return result, _text(table, environment)


def _text(table: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    measured: set[str] = set()
    missing: dict[str, str] = {}
    for row in table:
        for name, other in row["others"].items():
            if "seconds" in other:
                measured.add(name)
            else:
                missing[name] = other["missing"]
    rivals = sorted(measured)
    header = ["shape", "weights", "M", "backend", "us", "bf16 us", "ratio", "share of copy"]
    header += [f"{name} ratio" for name in rivals]
    notes = [f"{name}: not measured ({reason})" for name, reason in missing.items()]
    title = (
        f"{environment['device']}, torch {environment['torch']}; ratio: speed-up over torch's "
        "bfloat16 linear"
    )
    lines = [_line(row, rivals) for row in table]
    return "\n".join([title, rendering.render(lines, header), *notes])


def _line(row: dict[str, Any], rivals: list[str]) -> list[object]:
    """A row of the table as it is printed."""
    line = [f"{row['n']}x{row['k']}", row["weights"], row["m"], row["backend"]]
    line += [f"{row['seconds'] * 1e6:.1f}", f"{row['bf16_seconds'] * 1e6:.1f}"]
    line += [f"{row['ratio']:.2f}", f"{row['share_of_copy_bandwidth']:.0%}"]
    for name in rivals:
        seconds = row["others"].get(name, {}).get("seconds")
        line.append("-" if seconds is None else f"{row['bf16_seconds'] / seconds:.2f}")
    return line
