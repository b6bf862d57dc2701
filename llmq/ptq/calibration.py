"""The calibration text of a run: which one, as windows of tokens, and what is to be known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.models.arch import check_length, tower_parameters
from llmq.models.identity import source_name
from llmq.models.processors import load_processor, refusal_of_pictures
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.models.tokens import fingerprint, first_token, own_tokenizer
from llmq.ptq.methods import needs_text
from llmq.ptq.self_written import self_written
from llmq.ptq.sizing import default_text
from llmq.recipe import Recipe
from llmq.text import documents
from llmq.text.documentation import DOCUMENTATION
from llmq.text.held_out import begun_with, held_out_texts, window_starts
from llmq.text.picture_windows import RowReader, place_ids, with_pictures
from llmq.text.pictures import check_pillow


@dataclass(frozen=True)
class Calibration:
    """recipe: with the text's name. tokens: None where the recipe needs no text. remarks: what is
    to be known of the text, by topic."""

    recipe: Recipe
    tokens: documents.TokenSet | None
    remarks: dict[str, str]


def read_calibration(
    source: Source,
    stored: StoredModel,
    recipe: Recipe,
    calibration: str | documents.TokenSet | None,
    *,
    held_out: bool,
    device: str,
    on_text: Callable[[int, int], None] | None,
) -> Calibration:
    """The text of a recipe for a model. calibration, held_out, device, on_text: as of
    `llmq.ptq.job.prepare`; without `on_text`, text of the model's own is not written but has its
    shape alone. Raises `LlmqError` for a text that the recipe or the model has no use for."""
    tokens, remarks = None, {}
    if isinstance(calibration, documents.TokenSet):
        tokens = calibration if needs_text(recipe) else None
    elif needs_text(recipe):
        name = recipe.calibration if calibration is None else calibration
        if name is None:
            name = default_text(source)
            remarks = _remark_on_text(name)
        recipe = replace(recipe, calibration=source_name(name))
        if name != documents.SELF:
            tokens = calibration_tokens(source, stored, recipe, name, held_out=held_out)
        elif on_text is not None:
            tokens = self_written(source, recipe, device, on_text)
        else:
            tokens = _to_be_written(stored.config, recipe)
    if tokens is not None and not held_out:
        tokens = replace(tokens, held_out=())
    recipe, more = trainable(recipe, tokens)
    return Calibration(recipe, tokens, remarks | more)


def _to_be_written(config: Any, recipe: Recipe) -> documents.TokenSet:
    """The shape of text of the model's own."""
    check_windows(config, recipe)
    documents.warn_of_path(documents.SELF)
    return documents.TokenSet.unread(documents.SELF, recipe.samples, recipe.sequence_length)


def _remark_on_text(name: str) -> dict[str, str]:
    """What is to be known of a text that nobody has asked for."""
    what = {
        documents.SELF: "which the model writes",
        DOCUMENTATION: "the documentation that every Python has",
    }
    if name not in what:
        return {}
    remark = (
        f"{name}, {what[name]}, since none was given; text of the kind that it will see may lose "
        "less: --calibration FILE, or ultrachat (from the Hub)"
    )
    return {"calibration text": remark}


def calibration_tokens(
    source: Source, stored: StoredModel, recipe: Recipe, name: str, *, held_out: bool = True
) -> documents.TokenSet:
    """The calibration windows of a recipe for a model, from a text, and from pictures beside it
    where the model takes any. held_out: see `windows_of`."""
    tokenizer, config = own_tokenizer(source), stored.config
    check_windows(config, recipe)
    takes_pictures = bool(tower_parameters(stored.skeleton))
    text = documents.read_text(name, "calibration", tokenizer, with_pictures=takes_pictures)
    if not text.illustrated:
        return windows_of(tokenizer, config, recipe, text, name, held_out=held_out)
    if reason := refusal_of_pictures(stored.skeleton):
        raise LlmqError(reason)
    column = text.read["columns"][0][0]
    remedy = f"calibrate on the text alone: {name}#{column}"
    check_pillow(name)
    reader = RowReader(load_processor(source, remedy), type(stored.skeleton))
    if (bos := first_token(tokenizer, config)) is not None:
        reader = replace(reader, begin=tokenizer.convert_ids_to_tokens(bos))
    places = place_ids(config, reader.processor)
    of_text = windows_of(tokenizer, config, recipe, text, name, held_out=held_out, places=places)
    return with_pictures(of_text, text.illustrated, reader, config, recipe.seed)


def trainable(recipe: Recipe, tokens: documents.TokenSet | None) -> tuple[Recipe, dict[str, str]]:
    """The recipe, as far as the model can be run backwards on these windows: what its method does
    by default is left out with pictures, with a remark. Raises `LlmqError` for what was asked
    for."""
    wishes = {
        "scale_steps": (f"{recipe.scale_steps} scale steps (--scale-steps)", 0),
        "token_weights": (f"token weights {recipe.token_weights} (--token-weights)", "equal"),
    }
    left_out: dict[str, Any] = {}
    for name, (wish, without) in wishes.items():
        if getattr(recipe, name) == without:
            continue
        if tokens is None:
            raise LlmqError(
                f"{wish}: gradients are of calibration text, and method {recipe.method} reads "
                "none; use --method gptq, or leave the option out"
            )
        if tokens.pictures and not recipe.is_default(name):
            raise LlmqError(
                f"{wish}: gradients are of text alone, and the calibration file has pictures, too; "
                "calibrate on its text alone (FILE#COLUMN), or leave the option out"
            )
        if tokens.pictures:
            left_out[name] = without
    if not left_out:
        return recipe, {}
    remark = (
        f"method {recipe.method} goes without {' and '.join(left_out).replace('_', ' ')}: "
        "gradients are of text alone, and the calibration file has pictures, too"
    )
    return recipe.changed(**left_out), {"gradients": remark}


def check_windows(config: Any, recipe: Recipe) -> None:
    """Raise `LlmqError` for windows that are longer than the model has positions for."""
    check_length(config, recipe.sequence_length, f"--sequence-length {recipe.sequence_length}")


def windows(
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    recipe: Recipe,
    source: str,
    *,
    held_out: bool = True,
) -> documents.TokenSet:
    """Seeded windows of a text, each with a BOS token for the families that need it. held_out: see
    `windows_of`."""
    text = documents.read_text(source, "calibration", tokenizer)
    return windows_of(tokenizer, config, recipe, text, source, held_out=held_out)


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    recipe: Recipe,
    text: documents.Text,
    source: str,
    *,
    held_out: bool = True,
    places: Tensor | None = None,
) -> documents.TokenSet:
    """`windows` of a text that was read already. source: what messages call it. held_out: also cut
    windows to measure the result on, for which text of another kind is read. places: tokens that
    stand for pictures, where windows will begin with these: text has none of them, and is repeated
    where it is shorter than a window."""
    row = documents.tokenize(text.documents, tokenizer)
    if places is not None:
        row = row[~torch.isin(row, places)]
        row = row.repeat(-(-recipe.sequence_length // max(1, len(row))))
    documents.check_vocabulary(row, config.get_text_config().vocab_size, source)
    bos = first_token(tokenizer, config)
    found = documents.calibration_windows(
        row, recipe.samples, recipe.sequence_length, recipe.seed, source, bos
    )
    found = replace(found, tokenizer_sha256=fingerprint(tokenizer), read=text.read)
    if not held_out:
        return found
    texts = held_out_texts(
        row,
        window_starts(len(row), recipe.samples, recipe.sequence_length, recipe.seed),
        recipe.sequence_length,
        text.read["source"],
        tokenizer,
    )
    return replace(found, held_out=tuple(begun_with(each, bos) for each in texts))
