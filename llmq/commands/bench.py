"""`llmq bench`."""

from __future__ import annotations

import argparse
from typing import Any

from llmq.commands import common
from llmq.commands.values import real, whole

HELP = "Time the packed kernels beside torch's bfloat16 linear on this machine (--kernels, the default), or decoding with a synthetic Llama (--decode)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels", action="store_true", help="products of single layers (default)"
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="tokens per second of a synthetic Llama-3-8B-shaped model, bfloat16 and quantized; needs a GPU",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NxK",
        help="outputs x inputs of the layers (default: Llama-3-8B's and two squares on a GPU, 4096x4096 on a CPU)",
    )
    parser.add_argument("--rows", nargs="+", type=whole(1), metavar="M", help="rows of x")
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="SPEC",
        help="such as w4g128, w3g64-asym, w8; +a8 for INT8 activations, +a8g for those of --compute int8: w8+a8, ternary+a8g",
    )
    parser.add_argument(
        "--repeats",
        type=whole(1),
        default=20,
        metavar="N",
        help="measurements of which the median is taken (default: 20)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first measure the candidate tiles of every kernel and keep the fastest in ~/.cache/llmq; needs a GPU",
    )
    parser.add_argument(
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
    common.check_device(str(device))
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
        return result, common.render_pairs(result)
    return _kernels(args, device, environment)


def _kernels(
    args: argparse.Namespace, device: Any, environment: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    from llmq.benchmark import kernels, plot

    if args.plot:
        plot.check_plot(args.plot)
    on_gpu = device.type == "cuda"
    shapes = (
        _shapes(args.shapes)
        if args.shapes
        else list(kernels.GPU_SHAPES if on_gpu else kernels.CPU_SHAPES)
    )
    rows = args.rows or list(kernels.GPU_ROWS if on_gpu else kernels.CPU_ROWS)
    kinds = [
        kernels.Kind(text)
        for text in args.weights or (kernels.GPU_WEIGHTS if on_gpu else kernels.CPU_WEIGHTS)
    ]
    for kind in kinds:
        kind.spec.fit(1)  # reads the text now: a mistake should not come after minutes of tuning
    result: dict[str, Any] = dict(environment)
    if args.tune:
        from llmq.benchmark import tuner
        from llmq_kernels.triton import choices, tuning

        report = tuner.tune(shapes, rows, kinds, device, args.tune_seconds)
        result["tuning_seconds"] = report.seconds
        result["tuning_refused"] = report.refused
        result["tuning_not_reached"] = report.not_reached
        chip = choices.chip_of(device)
        tuning.save(chip, tuning.tuned_dir() / f"{tuning.slug(chip.name)}.json", environment)
    table = []
    with common.progress("bench") as show:
        for row in kernels.measure(shapes, rows, kinds, device, repeats=args.repeats):
            table.append(row)
            show(
                len(table),
                len(shapes) * len(rows) * len(kinds),
                f"{row['n']}x{row['k']} {row['weights']} M={row['m']}: {row['ratio']:.2f}",
            )
    result["rows"] = table
    if args.plot:
        plot.ratios(table, args.plot)
    return result, _text(table, environment)


def _text(table: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    rivals = sorted(
        {name for row in table for name, other in row["others"].items() if "seconds" in other}
    )
    header = [
        "shape",
        "weights",
        "M",
        "backend",
        "us",
        "bf16 us",
        "ratio",
        "share of copy",
        *(f"{name} ratio" for name in rivals),
    ]
    lines = [
        [
            f"{row['n']}x{row['k']}",
            row["weights"],
            row["m"],
            row["backend"],
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['bf16_seconds'] * 1e6:.1f}",
            f"{row['ratio']:.2f}",
        ]
        + [f"{row['share_of_copy_bandwidth']:.0%}"]
        + [
            f"{row['bf16_seconds'] / row['others'][name]['seconds']:.2f}"
            if "seconds" in row["others"].get(name, {})
            else "-"
            for name in rivals
        ]
        for row in table
    ]
    missing = {
        name: other["missing"]
        for row in table
        for name, other in row["others"].items()
        if "missing" in other
    }
    notes = [f"{name}: not measured ({reason})" for name, reason in missing.items()]
    title = f"{environment['device']}, torch {environment['torch']}; ratio: speed-up over torch's bfloat16 linear"
    return "\n".join([title, common.render(lines, header), *notes])
