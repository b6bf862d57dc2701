"""`llmq compare BASE QUANT`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.commands import comparison_text, options, rendering, scoring
from llmq.commands.parser import Parser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmq.evaluation.choices import ChoiceFile
    from llmq.models.source import Source

HELP = (
    "How far a quantized model is from its base: perplexity ratio with a paired interval, KL "
    "divergence, top-1 agreement, size; with --choices also answers that changed."
)

EXAMPLES = (
    "llmq compare tiny tiny-w4",
    "llmq compare tiny tiny-w4 --data my-text.jsonl --max-windows 50",
    "llmq compare tiny tiny-w4 --choices questions.jsonl  # answers that changed",
    "llmq compare tiny tiny-w4 --compute int8 --head-bits 8  # the fastest",
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("base", help=options.MODEL_HELP)
    parser.add_argument("quant", help="the quantized model: a folder or Hub id")
    options.add_evaluation_arguments(parser)
    parser.section("text")
    parser.add_argument(
        "--choices",
        type=Path,
        metavar="FILE",
        help='also a multiple-choice file, one {"question": "...", "choices": [...], "answer": 0} '
        "per line: accuracy of both models, and answers that changed",
    )
    parser.section("output")
    parser.more.add_argument(
        "--page",
        metavar="FILE",
        help="where the page with pictures goes (default: report.html in QUANT, where llmq wrote "
        "that folder)",
    )
    parser.set_defaults(protocol="gptq", stride=None)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result as JSON-able data and as text."""
    from llmq.errors import LlmqError
    from llmq.models.source import Source
    from llmq.reports.page import log_of, report_of, write

    folder = Source.open(args.quant).folder
    page, skipped = _page_path(args.page, folder), None
    try:
        report = None if page is None else report_of(folder)
    except LlmqError as error:
        if args.page is not None:
            raise  # before minutes of work
        page, report, skipped = None, None, str(error)
    summary = measured(args)
    if page is not None and report is not None:
        write(page, report, comparison=summary, log=log_of(folder))
    summary |= {"page": None if page is None else str(page), "page_skipped": skipped}
    return summary, comparison_text.render(summary)


def _page_path(given: str | None, folder: Path) -> Path | None:
    """Where the page goes: where it was asked for, or beside the report of a folder that llmq
    wrote here."""
    from llmq.models.identity import hub_id
    from llmq.reports.page import PAGE, REPORT
    from llmq.storage.manifest import has_manifest

    if given is not None:
        return Path(given)
    is_ours = has_manifest(folder) and (folder / REPORT).is_file() and hub_id(folder) is None
    return folder / PAGE if is_ours and os.access(folder, os.W_OK) else None


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """`args.quant` against `args.base`, as JSON-able data."""
    from llmq.evaluation.divergence import compare
    from llmq.evaluation.position_classes import special_ids
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
    choices = None if args.choices is None else _read_choices(args.choices, *sources)
    base, quant = (scoring.load_model(args, source) for source in sources)
    quantize_head(quant, args.head_bits)
    with rendering.progress("windows") as show, running(f"{args.base} or {args.quant}"):
        show(0, len(windows.tokens))
        special = special_ids(sources[0].config, sources[0].tokenizer)
        result = compare(base, quant, windows, show, special=special)
    flips = {} if choices is None else {"choices": _flips(choices, base, quant)}
    sizes = {"base_bytes": sources[0].weight_bytes, "quant_bytes": sources[1].weight_bytes}
    dtypes = " and ".join(
        dict.fromkeys(str(model.dtype).removeprefix("torch.") for model in (base, quant))
    )  # with --dtype auto they may differ
    return {
        "base": args.base,
        "quant": args.quant,
        "data": args.data,
        **result,
        **sizes,
        "dtype": dtypes,
        **scoring.conditions(args),
        **windows.identity(),
        **flips,
        "verified": verified,
    }


def _read_choices(path: Path, base: Source, quant: Source) -> ChoiceFile:
    """The questions, as both models read them."""
    from llmq.evaluation.choices import read_choices
    from llmq.models.tokens import own_tokenizer

    found = read_choices(path, own_tokenizer(base), base.config)
    found.check_positions(quant.config)
    return found


def _flips(choices: ChoiceFile, base: PreTrainedModel, quant: PreTrainedModel) -> dict[str, Any]:
    """What both models answer."""
    from llmq.evaluation.choices import chosen_answers
    from llmq.evaluation.flips import compare_answers
    from llmq.storage.boundary import running

    answers: list[list[int]] = []
    for name, model in (("base", base), ("quantized", quant)):
        with rendering.progress(f"choices, {name}") as show, running(f"the {name} model"):
            show(0, choices.n_rows)
            answers.append(chosen_answers(model, choices, show))
    before, after = answers
    return {**choices.identity(), **compare_answers(before, after, choices.answers)}


def _check_tokenizers(base: Source, quant: Source) -> None:
    """Both models read the same tokens: those of the base's tokenizer. A folder without one is
    taken to belong to it."""
    from llmq.models.tokens import TOKENIZER_FILES, check_same_tokenizer, own_tokenizer

    if any((quant.folder / name).is_file() for name in TOKENIZER_FILES):
        names = str(base.folder), str(quant.folder)
        check_same_tokenizer(base.tokenizer, own_tokenizer(quant), names)
