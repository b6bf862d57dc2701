"""Options that several commands share, and the types of their values. Nothing heavy is imported,
because `--help` goes through here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from llmq.commands.parser import More, Parser, fold_into_recipes
from llmq.errors import LlmqError
from llmq.formats.registry import AUTO, NAMES
from llmq.ptq.methods import METHODS, split_name
from llmq.ptq.transforms import TRANSFORMS

# Of the table of codes (llmq_kernels.core.codes), whose package takes torch to import.
BITS = ("2", "3", "4", "5", "6", "8", "ternary")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_HELP = "a folder, a .gguf file, a Hub id, or 'tiny' (the bundled model)"
TEXT_HELP = (
    "text file, .jsonl, .parquet, folder, Hub data set (name:config:split), each with #COLUMN for "
    "a column of another name, or 'bundled'"
)
LARGEST = 2**63 - 1  # torch's generators and sizes take no more
# Options of earlier versions, and how recipe files say the same.
RECIPE_KEYS = {
    "--alpha": "alpha: {}",
    "--order": "order: {}",
    "--sweeps": "sweeps: {}",
    "--tune-zero-points": "tune_zero_points: true",
    "--activation-range": "activation_range: {}",
}


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"expected a whole number, {bound}, got {text!r}")
        return value

    return read


def real(low: float = 0.0, high: float = math.inf) -> Callable[[str], float]:
    """A finite number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):
            bound = f"from {low:g} to {high:g}" if value > high else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"expected a finite number, {bound}, got {text!r}")
        return value

    return read


def method_name(text: str) -> str:
    """A method, with transforms before it: smoothquant+gptq."""
    try:
        split_name(text)
    except LlmqError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def byte_size(text: str) -> int:
    """Bytes, with a unit: 60MB, 3.5GB."""
    number, factor = text.strip().upper().removesuffix("B"), 1.0
    for unit, its in (("K", 1e3), ("M", 1e6), ("G", 1e9)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), its
    try:
        n_bytes = float(number) * factor
    except ValueError:
        n_bytes = math.nan
    if not 1 <= n_bytes < LARGEST:
        raise argparse.ArgumentTypeError(f"expected a size such as 60MB or 3.5GB, got {text!r}")
    return int(n_bytes)


def source(text: str) -> str:
    """Where text comes from: any string but an empty one, which would mean the working
    directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "expected a text file, .jsonl, .parquet, folder, Hub data set (name:config:split) or "
            "'bundled', got ''"
        )
    return text


def add_recipe_argument(parser: Parser) -> None:
    """What a run goes by, from a file."""
    parser.add_argument(
        "--recipe",
        metavar="FILE|NAME",
        help="a recipe in YAML or JSON, a report.json, or the name of a ready one such as w4-gptq; "
        "other options override it",
    )


def add_rule_argument(parser: Parser | More) -> None:
    """Other treatment for some layers."""
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=SPEC",
        help="another treatment for some layers, such as '*.down_proj=w8' or '*.layers.0.*=keep'; "
        "first match wins",
    )


def add_revision_argument(parser: Parser) -> None:
    """Which commit of a Hub model."""
    parser.more.add_argument("--revision", help="revision of a Hub model")


def add_overwrite_argument(parser: Parser) -> None:
    """Whether an earlier output may be replaced."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that llmq wrote earlier"
    )


def add_strict_argument(parser: Parser) -> None:
    """Whether a model may be read although it stores tensors that are not used."""
    parser.more.add_argument(
        "--strict",
        action="store_true",
        help="refuse a model with stored tensors that would be left out (default: name them)",
    )


def add_inference_arguments(parser: Parser) -> None:
    """How a model is run: device, arithmetic, and the bits of its head."""
    parser.section("how it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--compute",
        choices=("exact", "int8"),
        help="int8: quantized layers on a CPU round their activations to INT8 per token and group, "
        "which is faster (default: $LLMQ_COMPUTE, else exact)",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(8, 4),
        help="also round the output head and the embeddings to this many bits, for this run "
        "(compare: of QUANT; default: as stored)",
    )
    add_revision_argument(parser)
    add_strict_argument(parser)


def add_evaluation_arguments(parser: Parser) -> None:
    """Text, windows, BOS policy, dtype and device of an evaluation."""
    parser.section("text")
    parser.add_argument(
        "--data", type=source, default="bundled", metavar="SOURCE", help=f"{TEXT_HELP} (default)"
    )
    parser.add_argument(
        "--sequence-length",
        type=whole(2),
        metavar="T",
        help="tokens per window (default: 2048, or what the model has positions for)",
    )
    parser.add_argument(
        "--max-windows",
        type=whole(1),
        metavar="N",
        help="evaluate the first N windows only (default: all of a SOURCE that is given, the first "
        "32,768 tokens of the bundled text)",
    )
    parser.more.add_argument(
        "--bos",
        choices=("auto", "every-window", "start", "none"),
        default="auto",
        metavar="WHERE",
        help="auto, every-window, start or none (default: auto)",
    )
    parser.section("how it runs")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16 (default: float32, free of kernel rounding)",
    )
    parser.more.add_argument(
        "--no-verify",
        action="store_true",
        help="do not check a folder that llmq wrote against the hashes of its manifest",
    )
    add_inference_arguments(parser)


def add_quantization_arguments(parser: Parser) -> None:
    """What `plan` and `quantize` have in common: everything that makes a recipe, its text, and the
    limits of the run."""
    parser.section("what it becomes")
    _add_grid_arguments(parser)
    add_rule_argument(parser)
    add_recipe_argument(parser)
    _add_activation_arguments(parser)
    parser.section("how it is quantized")
    _add_method_argument(parser)
    _add_gptq_arguments(parser)
    _add_blockwise_arguments(parser)
    parser.section("calibration text")
    _add_calibration_arguments(parser)
    parser.section("run and output")
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda to run block by block on the GPU"
    )
    _add_limits(parser)
    fold_into_recipes(parser, RECIPE_KEYS)


def _add_method_argument(parser: Parser) -> None:
    parser.add_argument(
        "--method",
        type=method_name,
        metavar="METHOD",
        help=f"{'; '.join(f'{name}: {what}' for name, what in METHODS.items())} (default: gptq). "
        f"Before it, with a +: {'; '.join(f'{name}: {what}' for name, what in TRANSFORMS.items())}",
    )


def _add_grid_arguments(parser: Parser) -> None:
    parser.add_argument("--bits", choices=BITS, help="default: 4")
    parser.add_argument(
        "--group-size",
        type=whole(-1),
        metavar="G",
        help="columns per scale; -1: one scale per row, 0: one per tensor (default: 128; 8 bits: "
        "-1)",
    )
    parser.more.add_argument(
        "--bpw",
        type=real(),
        metavar="BITS",
        help="bits per quantized weight on average, such as 3.25: layers get 2 to 8 bits each, by "
        "what these are worth to the model, and the best single width stays if it loses less",
    )
    parser.more.add_argument(
        "--max-bytes",
        type=byte_size,
        metavar="SIZE",
        help="the same for weight files of at most this size, such as 60MB, with embeddings and "
        "head where the format holds them in few bits (--format llmq)",
    )
    parser.more.add_argument(
        "--asymmetric", action="store_true", help="store a zero point per group"
    )
    parser.more.add_argument(
        "--embeddings",
        metavar="SPEC",
        help="quantize the embeddings, too, such as w8 or w4g64 (default: as stored); where the "
        "output head is the same tensor, both",
    )
    parser.more.add_argument(
        "--head",
        metavar="SPEC",
        help="quantize an output head that is a tensor of its own (default: as stored)",
    )


def _add_calibration_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--calibration",
        type=source,
        metavar="SOURCE",
        help="ultrachat, c4, wikitext, code (from the Hub, kept), self (written by the model), "
        f"python-docs, or {TEXT_HELP}; a column 'images' beside the text goes through a multimodal "
        "model's processor (default: self, for more than 2.5 GB of weights python-docs, for 'tiny' "
        "bundled)",
    )
    parser.more.add_argument(
        "--no-held-out",
        action="store_true",
        help="do not measure the result on text that it was not calibrated on (KL and perplexity "
        "of 8 windows each of that text and of another kind)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a quarter of the calibration text, in shorter windows, for a first look",
    )
    parser.more.add_argument(
        "--samples",
        type=whole(1),
        metavar="N",
        help="calibration windows (default: by the width of the model, 64 to 128; see 'llmq plan')",
    )
    parser.more.add_argument(
        "--sequence-length",
        type=whole(2),
        metavar="T",
        help="tokens per calibration window (default: by the width of the model, up to 2048)",
    )
    parser.more.add_argument(
        "--seed", type=whole(0), help="seed of the calibration windows (default: 0)"
    )


def _add_gptq_arguments(parser: Parser) -> None:
    parser.more.add_argument(
        "--act-order",
        action="store_true",
        help="true activation order with a stored g_idx: slower to run, read by few engines, and "
        "only with --format gptq, gptq_v2 or llmq",
    )
    parser.more.add_argument(
        "--damping",
        type=real(),
        help="share of the median Hessian diagonal that is added to it (default: 0.5 where "
        "tokens are weighed, else 0.1)",
    )
    parser.more.add_argument(
        "--no-search",
        action="store_true",
        help="choose scales by range, not by Hessian-weighted error",
    )
    parser.more.add_argument(
        "--inputs",
        choices=("quantized", "full-precision", "both"),
        help="inputs that layers are measured on; both: also correct for earlier losses (default: "
        "both)",
    )
    parser.more.add_argument(
        "--token-weights",
        choices=("equal", "fisher"),
        help="what an error at a token counts: the same everywhere, or what it does to the model, "
        "by one more pass forward and back (default: fisher with blockwise, else equal)",
    )
    parser.more.add_argument(
        "--all-experts",
        action="store_true",
        default=None,
        help="measure every expert of a mixture on all tokens, not only on those routed to it",
    )


def _add_blockwise_arguments(parser: Parser) -> None:
    parser.more.add_argument(
        "--iterations",
        type=whole(1),
        metavar="N",
        help="steps per block of --method blockwise (default: 50)",
    )
    parser.more.add_argument(
        "--learning-rate",
        type=real(),
        help="size of these steps, as a share of the distance between two codes (default: 0.02)",
    )
    parser.more.add_argument(
        "--scale-steps",
        type=whole(0),
        metavar="N",
        help="steps in which the scales of all blocks are trained together when these are done "
        "(default: 40 with blockwise, else 0)",
    )
    parser.more.add_argument(
        "--init",
        choices=("rtn", "gptq"),
        help="what --method blockwise starts from (default: gptq)",
    )
    parser.more.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="run blocks in bfloat16 while they are trained (default: if the model is stored in it "
        "and the hardware multiplies it)",
    )


def _add_activation_arguments(parser: Parser) -> None:
    parser.more.add_argument(
        "--activations",
        choices=("none", "int8-token", "int8-static"),
        help="quantize layer inputs, per token or by a static range, and multiply integers "
        "(default: none)",
    )
    parser.more.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 4),
        help="quantize keys and values per token and head (default: not)",
    )


def _add_limits(parser: Parser) -> None:
    parser.more.add_argument(
        "--format",
        choices=(AUTO, *NAMES),
        default=AUTO,
        metavar="FORMAT",
        help=f"{AUTO}, {', '.join(NAMES)} (default: {AUTO})",
    )
    parser.more.add_argument(
        "--strict",
        action="store_true",
        help="refuse any deviation from what was asked: other group sizes, kept layers, fallbacks",
    )
    parser.more.add_argument(
        "--allow-requantize",
        action="store_true",
        help="take a MODEL that is quantized already for the numbers that its codes stand for; "
        "what is rounded again loses twice (not needed for models published in FP8 or MXFP4)",
    )
    add_revision_argument(parser)
    parser.more.add_argument(
        "--max-ram",
        type=real(),
        metavar="GB",
        help="refuse a run whose planned peak memory is above this; what is left of it holds "
        "hidden states in the place of files",
    )
    parser.more.add_argument(
        "--max-gpu-memory",
        type=real(),
        metavar="GB",
        help="the same for the memory of the GPU, with --device cuda",
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
