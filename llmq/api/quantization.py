"""`llmq.quantize`: a folder into a folder, or a model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.api.models import FORMS, ModelName, is_name
from llmq.api.recipes import DEFAULT, RecipeLike, recipe_of
from llmq.api.reports import BlockReports, Report
from llmq.api.texts import TextOrIds, token_set, windows_for
from llmq.arguments import check_type, refused
from llmq.errors import LlmqError, VerificationError
from llmq.formats.placement import device_of
from llmq.grid.spec import QuantSpec
from llmq.models.source import Source
from llmq.ptq import in_memory
from llmq.ptq.choice import Budget
from llmq.ptq.job import prepare
from llmq.ptq.mixed_run import choose, measured_costs, quantize_mixed
from llmq.ptq.results import BlockReport
from llmq.ptq.run import quantize_folder
from llmq.recipe import OUTSIDE, Recipe, outside_spec
from llmq.text.documents import TokenSet

_LONGEST_NAME = 300  # characters of where text comes from; more is a text


@overload
def quantize(
    model: ModelName,
    out: str | os.PathLike[str],
    recipe: RecipeLike = ...,
    calibration: TextOrIds | TokenSet | None = ...,
    *,
    method: str | None = ...,
    embeddings: str | QuantSpec | None = ...,
    head: str | QuantSpec | None = ...,
    samples: int | None = ...,
    sequence_length: int | None = ...,
    seed: int | None = ...,
    format: str = ...,
    device: str = ...,
    revision: str | None = ...,
    strict: bool = ...,
    overwrite: bool = ...,
    allow_requantize: bool = ...,
    bpw: float | None = ...,
    max_bytes: int | None = ...,
    on_block: Callable[[BlockReport], None] = ...,
) -> Report: ...


@overload
def quantize(
    model: PreTrainedModel,
    recipe: RecipeLike = ...,
    calibration: TextOrIds | TokenSet | None = ...,
    *,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    method: str | None = ...,
    embeddings: str | QuantSpec | None = ...,
    head: str | QuantSpec | None = ...,
    samples: int | None = ...,
    sequence_length: int | None = ...,
    seed: int | None = ...,
    on_block: Callable[[BlockReport], None] = ...,
    tokens: Tensor | None = ...,
) -> BlockReports: ...


def quantize(model: Any, *arguments: Any, **options: Any) -> Any:
    """Quantize a folder into a folder, one block in memory at a time, or a model in memory, in
    place.

        llmq.quantize("Qwen/Qwen3-0.6B", "qwen3-w4")              # GPTQ, 4 bits; gives a Report
        llmq.quantize("tiny", "out", "W8A8", ["a text", "another"])
        llmq.quantize(model, "w4g128", ["a text", "another"])     # gives BlockReports
        llmq.quantize(model, ["W4A16", "*.down_proj=w8"], token_ids)

    recipe: a `Recipe`; a spec (w4g128, w3g64-asym, w8, ternary-g128) or a scheme (W4A16, W8A8,
        W4A8, W3A16, W2A16); a rule (`*.down_proj=w8`), or a list of rules and one spec; a ready
        recipe ("w4-gptq") or a recipe file.
    calibration: a list of texts, or token ids as `llmq.calibration_windows` takes them; for a
        folder also a text file, a folder or a data set, as the command line takes it, and without
        any the default of the command line. Methods "rtn" and "hqq" need none.
    embeddings, head: specs for these, such as "w8" or "w4g64" (default: as they are); for a model
        where they are one tensor, one of the two.
    method, embeddings, head, samples, sequence_length, seed: go before the recipe's.
    tokenizer: of a model in memory, in place of that of the folder it was loaded from.
    format, device, revision, strict, overwrite, allow_requantize: as on the command line.
    bpw, max_bytes: bits per quantized weight on average, or bytes of the weight files: each layer
        gets its bits by what these are worth, with the group size of the recipe; rules stay.
    on_block: told of every block when it is done.

    A folder: an interrupted run continues when it is called again. In memory: every layer stays on
    its device. Raises `LlmqError` for bad input, `VerificationError` when the result fails its
    checks."""
    if isinstance(model, PreTrainedModel):
        return _quantize_model(model, *arguments, **options)
    if is_name(model):
        return _quantize_folder(model, *arguments, **options)
    raise refused("model", model, FORMS)


def _quantize_model(
    model: PreTrainedModel,
    recipe: RecipeLike = DEFAULT,
    calibration: TextOrIds | TokenSet | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: Tensor | None = None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    **options: Any,
) -> BlockReports:
    """tokens: what `calibration` was called when it took nothing else."""
    chosen = recipe_of(recipe, model.config, **_of_recipe(options))
    given = tokens if calibration is None else calibration
    windows = windows_for(model, given, chosen, tokenizer)
    return BlockReports(in_memory.quantize(model, chosen, windows, on_block=on_block))


def _quantize_folder(
    model: ModelName,
    out: str | os.PathLike[str] | None = None,
    recipe: RecipeLike = DEFAULT,
    calibration: str | TextOrIds | TokenSet | None = None,
    *,
    format: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    allow_requantize: bool = False,
    bpw: float | None = None,
    max_bytes: int | None = None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    **options: Any,
) -> Report:
    check_type("out", out, (str, os.PathLike), "the folder to write")
    assert out is not None
    place = str(device_of(device, None, 0))
    source = Source.open(model, revision)
    chosen = recipe_of(recipe, source.config, **_of_recipe(options))
    given: dict[str, Any] = {"format": format, "strict": strict, "device": place}
    given["allow_requantize"] = allow_requantize
    if calibration is not None:
        given["calibration"] = _calibration(source, calibration, chosen)
    is_mixed = bpw is not None or max_bytes is not None
    job = prepare(source, chosen, for_budget=is_mixed, **given)
    how: dict[str, Any] = {"device": place, "overwrite": overwrite, "on_block": on_block}
    if not is_mixed:
        report = quantize_folder(job, Path(out), **how)
    else:
        budget = Budget.of(bpw, max_bytes)
        mixed = choose(
            job, measured_costs(job, budget, place), budget, format=format, strict=strict
        )
        report = quantize_mixed(mixed, Path(out), **how)
    if strict and report["fallbacks"]:
        raise VerificationError(
            f"strict: {out} was written, but {len(report['fallbacks'])} layers fell back to plain "
            f"rounding, the first being {report['fallbacks'][0]}"
        )
    return Report({"out": os.fspath(out), **report})


def _calibration(source: Source, calibration: Any, recipe: Recipe) -> str | TokenSet:
    """Windows of what is given, or the name of where text is."""
    if isinstance(calibration, TokenSet):
        return calibration
    if not isinstance(calibration, str):
        return token_set(source, calibration, recipe, None, held_out=True)
    if "\n" in calibration or len(calibration) > _LONGEST_NAME:
        raise LlmqError(
            f"calibration: a text of {len(calibration)} characters, where a name of a file, a "
            "folder or a data set was expected; give texts as a list, [text]"
        )
    return calibration


def _of_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Options that are fields of the recipe. Raises `TypeError`, as Python does, for others."""
    for name in options:
        if name not in ("method", *OUTSIDE, "samples", "sequence_length", "seed"):
            raise TypeError(f"quantize() got an unexpected keyword argument {name!r}")
    specs = {name: outside_spec(options[name], name) for name in OUTSIDE if name in options}
    return options | specs
