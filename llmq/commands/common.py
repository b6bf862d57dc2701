"""Options that several commands share, progress on stderr, and tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from llmq.commands.values import real, source, whole
from llmq.formats.registry import AUTO, NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from llmq.grid.spec import QuantSpec
    from llmq.models.source import Source
    from llmq.recipe import Recipe
    from llmq.text.windows import Windows

MODEL_HELP = "a folder, a Hub id, or 'tiny' (the bundled model)"


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Text, windows, BOS policy, dtype and device of an evaluation."""
    parser.add_argument(
        "--data",
        type=source,
        default="bundled",
        metavar="SOURCE",
        help="text file, .jsonl, .parquet, folder, Hub data set (name:config:split), or 'bundled' (default)",
    )
    parser.add_argument(
        "--sequence-length",
        type=whole(2),
        metavar="T",
        help="tokens per window (default: 2048, or what the model has positions for)",
    )
    parser.add_argument(
        "--bos", default="auto", help="auto, every-window, start or none (default: auto)"
    )
    parser.add_argument(
        "--max-windows", type=whole(1), metavar="N", help="evaluate the first N windows only"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="auto, float32, bfloat16 or float16 (default: float32, free of kernel rounding)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--revision", help="revision of a Hub model")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not check a folder that llmq wrote against the hashes of its manifest",
    )
    add_compute_argument(parser)
    add_head_argument(parser)
    add_strict_argument(parser)


def add_strict_argument(parser: argparse.ArgumentParser) -> None:
    """Whether a model may be read although it stores tensors that are not used."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a model with stored tensors that would be left out (default: name them)",
    )


def add_compute_argument(parser: argparse.ArgumentParser) -> None:
    """Whether activations may be rounded at run time."""
    compute_help = "int8: quantized layers on a CPU round their activations to INT8 per token and group, which is faster (default: $LLMQ_COMPUTE, else exact)"
    parser.add_argument("--compute", choices=("exact", "int8"), default=None, help=compute_help)


def add_head_argument(parser: argparse.ArgumentParser) -> None:
    """Whether the output head and the embeddings are quantized, too."""
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(8, 4),
        help="also round the output head and the embeddings to this many bits, for this run (compare: of QUANT; default: as stored)",
    )


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` and `quantize` have in common: everything that makes a recipe."""
    parser.add_argument(
        "--method",
        choices=("rtn", "gptq", "blockwise"),
        default=None,
        help="blockwise: GPTQ, then every block is trained; best below 4 bits (default: gptq)",
    )
    parser.add_argument(
        "--bits", choices=("2", "3", "4", "8", "ternary"), default=None, help="default: 4"
    )
    parser.add_argument(
        "--group-size",
        type=whole(-1),
        metavar="G",
        help="columns per scale; -1: one scale per row, 0: one per tensor (default: 128; 8 bits: -1)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="store a zero point per group")
    parser.add_argument(
        "--act-order",
        action="store_true",
        help="true activation order with a stored g_idx; slower to run",
    )
    parser.add_argument(
        "--order",
        choices=("group", "static", "none"),
        default=None,
        help="column order of GPTQ (default: group)",
    )
    parser.add_argument(
        "--damping",
        type=real(),
        help="share of the mean Hessian diagonal that is added to it (default: 0.01)",
    )
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="choose scales by range, not by Hessian-weighted error",
    )
    parser.add_argument(
        "--sweeps",
        type=whole(0),
        help="passes of coordinate descent after GPTQ; 0 for plain GPTQ (default: 2)",
    )
    parser.add_argument(
        "--inputs",
        choices=("quantized", "full-precision", "both"),
        default=None,
        help="inputs that layers are measured on; both: also correct for earlier losses (default: both)",
    )
    parser.add_argument("--alpha", type=real(), help="share of that correction (default: 0.5)")
    parser.add_argument(
        "--iterations",
        type=whole(1),
        metavar="N",
        help="steps per block of --method blockwise (default: 150)",
    )
    parser.add_argument(
        "--learning-rate",
        type=real(),
        help="size of these steps, as a share of the distance between two codes (default: 0.02)",
    )
    parser.add_argument(
        "--init",
        choices=("rtn", "gptq"),
        default=None,
        help="what --method blockwise starts from (default: gptq)",
    )
    parser.add_argument(
        "--tune-zero-points",
        action="store_true",
        default=None,
        help="--method blockwise trains zero points, too (default: weights and scales)",
    )
    autocast_help = "run blocks in bfloat16 while they are trained (default: if the model is stored in it and the hardware multiplies it)"
    parser.add_argument(
        "--autocast", action=argparse.BooleanOptionalAction, default=None, help=autocast_help
    )
    activations_help = "quantize layer inputs, per token or by a static range, and multiply integers (default: none)"
    parser.add_argument(
        "--activations",
        choices=("none", "int8-token", "int8-static"),
        default=None,
        help=activations_help,
    )
    parser.add_argument(
        "--activation-range",
        choices=("minmax", "percentile", "mse"),
        default=None,
        help="how static ranges are chosen (default: mse)",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 4),
        help="quantize keys and values per token and head (default: not)",
    )
    rule_help = "another treatment for some layers, such as '*.down_proj=w8' or '*.layers.0.*=keep'; first match wins"
    parser.add_argument(
        "--rule", action="append", default=[], metavar="PATTERN=SPEC", help=rule_help
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="a report.json, or a recipe as JSON; other options override it, in the specs of its rules, too",
    )
    parser.add_argument(
        "--calibration",
        type=source,
        default="bundled",
        metavar="SOURCE",
        help="text file, .jsonl, .parquet, folder, Hub data set (name:config:split), or 'bundled' (default)",
    )
    parser.add_argument(
        "--samples", type=whole(1), metavar="N", help="calibration windows (default: 128)"
    )
    parser.add_argument(
        "--sequence-length",
        type=whole(2),
        metavar="T",
        help="tokens per calibration window (default: 2048, or what the model has positions for)",
    )
    parser.add_argument(
        "--seed", type=whole(0), help="seed of the calibration windows (default: 0)"
    )
    parser.add_argument(
        "--format", default=AUTO, help=f"{AUTO}, {', '.join(NAMES)} (default: {AUTO})"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse any deviation from what was asked: other group sizes, kept layers, fallbacks",
    )
    parser.add_argument("--revision", help="revision of a Hub model")
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda to run block by block on the GPU"
    )
    parser.add_argument(
        "--max-ram",
        type=real(),
        metavar="GB",
        help="refuse a run whose planned peak memory is above this",
    )
    parser.add_argument(
        "--max-gpu-memory",
        type=real(),
        metavar="GB",
        help="the same for the memory of the GPU, with --device cuda",
    )


def read_recipe(args: argparse.Namespace, max_length: int) -> Recipe:
    """The recipe of the options. max_length: tokens the model has positions for, the cap of the
    default window."""
    from dataclasses import replace

    from llmq.errors import LlmqError
    from llmq.recipe import Recipe, Rule

    defaults = Recipe(sequence_length=min(2048, max_length), rules=(Rule("*", _spec(args)),))
    base = _recipe_of_file(args.recipe, defaults, args) if args.recipe else defaults
    if args.act_order and args.order:
        raise LlmqError("--act-order and --order contradict each other; give one of them")
    names = (
        "method",
        "init",
        "tune_zero_points",
        "damping",
        "sweeps",
        "inputs",
        "alpha",
        "samples",
        "sequence_length",
        "seed",
        "iterations",
        "learning_rate",
        "autocast",
        "activation_range",
    )
    options = {name: getattr(args, name) for name in names}
    options |= {
        "order": "act" if args.act_order else args.order,
        "search": False if args.no_search else None,
    }
    if args.activations or args.kv_bits:
        base = replace(
            base,
            activations=replace(
                base.activations,
                **{
                    key: value
                    for key, value in (("kind", args.activations), ("kv_bits", args.kv_bits))
                    if value
                },
            ),
        )
    recipe = replace(base, **{key: value for key, value in options.items() if value is not None})
    return replace(recipe, rules=(*(Rule.parse(text) for text in args.rule), *recipe.rules))


def _spec(args: argparse.Namespace) -> QuantSpec:
    from llmq.grid.spec import PER_ROW, QuantSpec

    bits = args.bits or "4"
    group_size = args.group_size if args.group_size is not None else PER_ROW if bits == "8" else 128
    return QuantSpec(_code(bits), group_size, not args.asymmetric)


def _code(bits: str) -> str:
    return bits if bits == "ternary" else f"int{bits}"


def _recipe_of_file(path: str, defaults: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe of a file: what it leaves out from the defaults, and in the specs of its rules
    what the options give; layers that it keeps stay kept."""
    from dataclasses import replace

    from llmq.errors import LlmqError
    from llmq.recipe import Recipe
    from llmq.storage.json_files import read_object

    expected = "give a report.json or the JSON that it holds under 'recipe'"
    try:
        report = read_object(path, "a recipe", expected, unique_keys=True)
    except LlmqError as error:
        raise LlmqError(f"--recipe {error}") from None
    data = report.get("recipe", report)
    if not isinstance(data, dict):
        raise LlmqError(
            f"--recipe {path}: not a recipe: what it holds under 'recipe' is no object; {expected}"
        )
    try:
        recipe = Recipe.from_json({"sequence_length": defaults.sequence_length, **data})
        if "rules" not in data:
            return replace(recipe, rules=defaults.rules)
        given = {
            "code": _code(args.bits) if args.bits else None,
            "group_size": args.group_size,
            "symmetric": False if args.asymmetric else None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return replace(
            recipe,
            rules=tuple(
                rule if rule.spec is None else replace(rule, spec=replace(rule.spec, **given))
                for rule in recipe.rules
            ),
        )
    except LlmqError as error:
        raise LlmqError(f"--recipe {path}, with the options beside it: {error}") from None


def evaluation_windows(args: argparse.Namespace, source: Source) -> Windows:
    """The windows that `eval` and `compare` score."""
    from dataclasses import replace

    from llmq.models.tokens import own_tokenizer
    from llmq.text.documents import load_documents
    from llmq.text.windows import cut_windows

    length = args.sequence_length or min(2048, max_positions(source.config))
    windows = cut_windows(
        load_documents(args.data, "eval"),
        own_tokenizer(source),
        source.config,
        length,
        args.bos,
    )
    return (
        replace(windows, tokens=windows.tokens[: args.max_windows]) if args.max_windows else windows
    )


def check_manifest(args: argparse.Namespace, model_dir: Path) -> dict[str, Any] | None:
    """Check the files of a folder that llmq wrote against their hashes, unless told not to; the
    number of files and the seconds it took, or None for a folder without a manifest. Raises
    `VerificationError`."""
    from llmq.storage.manifest import check_folder, has_manifest

    if args.no_verify or not has_manifest(model_dir):
        return None
    verdict = check_folder(model_dir)
    if verdict.seconds > 5:
        print(
            f"{model_dir}: {verdict.n_files} files checked against their hashes in "
            f"{verdict.seconds:.1f} s (--no-verify leaves it out)",
            file=sys.stderr,
        )
    return {"files": verdict.n_files, "seconds": verdict.seconds}


def max_positions(config: Any) -> int:
    """Tokens that a model has positions for; models without a limit get 2048."""
    from llmq.models.arch import position_limit

    return position_limit(config) or 2048


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What else a figure depends on. compute: as quantized layers are asked to multiply; head_bits:
    of head and embeddings, None: as stored."""
    from llmq_kernels.core.compute import default_mode

    return {"compute": args.compute or default_mode(), "head_bits": args.head_bits}


def render_conditions(summary: dict[str, Any]) -> str:
    """What a figure was measured on and with, for its text."""
    head = "" if summary["head_bits"] is None else f", head at {summary['head_bits']} bits"
    where = f"{summary['tokens']} tokens of {summary['data']}, protocol {summary['protocol']} at {summary['sequence_length']}, BOS {summary['bos']}"
    return f"{where}, {summary['dtype']}, compute {summary['compute']}{head}"


def companion_lines(report: dict[str, Any]) -> dict[str, str]:
    """What of the source is not in the output, for the text of a report."""
    lines = {}
    if left := report["left_behind"]:
        names = [name for name in left if not name.startswith(".")] or list(left)
        more = ", ..." if len(left) > len(names[:3]) else ""
        lines["left behind"] = (
            f"{len(left)} files of the source ({', '.join(names[:3])}{more}); report.json has the "
            "reasons"
        )
    if dropped := report["dropped_auto_map"]:
        lines["auto_map"] = (
            f"{len(dropped)} entries dropped, whose code is not in the source: "
            f"{', '.join(dropped[:3])}"
        )
    return lines


def render_interval(bounds: Sequence[float] | None, digits: str) -> str:
    """A 95% interval, or why there is none. digits: the format of its bounds."""
    return (
        "one window, no interval"
        if bounds is None
        else f"95% interval {bounds[0]:{digits}} to {bounds[1]:{digits}}"
    )


def check_device(device: str) -> None:
    """Raise for a device that is not there."""
    from llmq.errors import LlmqError

    if device == "cpu":
        return
    import torch

    if not (device.startswith("cuda") and torch.cuda.is_available()):
        raise LlmqError(
            f"--device {device}: not available here; use --device cpu ('llmq doctor' lists the "
            "devices)"
        )


class Show(Protocol):
    """Show progress: done of total, and a remark."""

    def __call__(self, done: int, total: int, remark: str = "") -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Show]:
    """A progress bar on a terminal, plain lines elsewhere. What the first call reports as done
    counts as done before."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:

        def print_line(done: int, total: int, remark: str = "") -> None:
            print(f"{title} {done}/{total} {remark}".rstrip(), file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, remark="")

        def move(done: int, total: int, remark: str = "") -> None:
            bar.update(task, completed=done, total=total, remark=remark)

        yield move


def render(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A plain text table, numbers to the right."""
    table = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    numeric = [
        all(row[i][:1].isdigit() or row[i][:1] in "-+" for row in table[1:])
        for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def render_pairs(pairs: dict[str, object]) -> str:
    """Names and values, one per line."""
    width = max(map(len, pairs))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs.items())
