"""`llmq compare BASE QUANT`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llmq.commands import options, rendering, scoring
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from llmq.models.source import Source

HELP = (
    "How far a quantized model is from its base: perplexity ratio with a paired interval, KL "
    "divergence, top-1 agreement, size."
)

EXAMPLES = (
    "llmq compare tiny tiny-w4",
    "llmq compare tiny tiny-w4 --data my-text.jsonl --max-windows 50",
    "llmq compare tiny tiny-w4 --compute int8 --head-bits 8  # the fastest",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("base", help=options.MODEL_HELP)
    parser.add_argument("quant", help="the quantized model: a folder or Hub id")
    options.add_evaluation_arguments(parser)
    parser.set_defaults(protocol="gptq", stride=None)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.evaluation.divergence import compare
    from llmq.evaluation.position_classes import special_ids
    from llmq.formats.load import load
    from llmq.inference.head import quantize_head
    from llmq.models.arch import check_length
    from llmq.models.source import Source
    from llmq.storage.boundary import running

    options.check_device(args.device)
    sources = Source.open(args.base, args.revision), Source.open(args.quant)
    verified = {
        "base": scoring.check_manifest(args, sources[0].folder),
        "quant": scoring.check_manifest(args, sources[1].folder),
    }
    windows = scoring.evaluation_windows(args, sources[0])
    _check_tokenizers(*sources)
    length = windows.tokens.shape[1]
    check_length(sources[1].config, length, f"windows of {length} tokens, {args.quant}")
    base, quant = (
        load(
            source,
            dtype=args.dtype,
            device=args.device,
            compute=args.compute,
            strict=args.strict,
        )
        for source in sources
    )
    quantize_head(quant, args.head_bits)
    with rendering.progress("windows") as show, running(f"{args.base} or {args.quant}"):
        show(0, len(windows.tokens))
        special = special_ids(sources[0].config, sources[0].tokenizer)
        result = compare(base, quant, windows, show, special=special)
    sizes = {"base_bytes": sources[0].weight_bytes, "quant_bytes": sources[1].weight_bytes}
    dtypes = " and ".join(
        dict.fromkeys(str(model.dtype).removeprefix("torch.") for model in (base, quant))
    )  # with --dtype auto they may differ
    summary = {
        "base": args.base,
        "quant": args.quant,
        "data": args.data,
        **result,
        **sizes,
        "dtype": dtypes,
        **scoring.conditions(args),
        **windows.identity(),
        "verified": verified,
    }
    return summary, _text(summary)


def _check_tokenizers(base: Source, quant: Source) -> None:
    """Both models read the same tokens: those of the base's tokenizer. A folder without one is
    taken to belong to it."""
    from llmq.models.tokens import TOKENIZER_FILES, check_same_tokenizer, own_tokenizer

    if any((quant.folder / name).is_file() for name in TOKENIZER_FILES):
        names = str(base.folder), str(quant.folder)
        check_same_tokenizer(base.tokenizer, own_tokenizer(quant), names)


def _text(summary: dict[str, Any]) -> str:
    ratio = rendering.render_interval(summary["perplexity_ratio_ci95"], ".5f")
    kl = rendering.render_interval(summary["kl_mean_ci95"], ".3e")
    perplexity = f"{summary['base_perplexity']:.4f} -> {summary['quant_perplexity']:.4f}"
    sizes = f"{summary['base_bytes'] / 1e6:.1f} MB -> {summary['quant_bytes'] / 1e6:.1f} MB"
    return rendering.render_pairs(
        {
            "perplexity": perplexity,
            "ratio": f"{summary['perplexity_ratio']:.5f} ({ratio})",
            "KL, mean": f"{summary['kl_mean']:.3e} nats ({kl})",
            "KL, p99 and max": f"{summary['kl_p99']:.3e} and {summary['kl_max']:.3e} nats",
            "KL by position": rendering.render_classes(summary["kl_by_position"]),
            "top-1 agreement": f"{summary['top1_agreement']:.2%}",
            "target's probability": f"RMS change {summary['rms_probability_change']:.2%}",
            "weight files": f"{sizes} ({summary['quant_bytes'] / summary['base_bytes']:.0%})",
            "measured on": rendering.render_conditions(summary),
        }
    )
