"""Text as an argument, and the token windows that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.api.models import ModelLike, opened, tokenizer_for
from llmq.arguments import refused
from llmq.errors import LlmqError
from llmq.evaluation.protocols import protocol_named
from llmq.models.arch import check_length, needs_bos
from llmq.models.source import Source
from llmq.models.tokens import first_token
from llmq.ptq import sizing
from llmq.ptq.calibration import windows_of
from llmq.recipe import Recipe
from llmq.text import documents
from llmq.text.documents import TokenSet, check_vocabulary, check_windows
from llmq.text.windows import Bos, Windows, cut_row

TokenIds: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
TextOrIds: TypeAlias = str | Sequence[str] | TokenIds
GIVEN = "given tokens"  # what reports call them
GIVEN_TEXTS = "given texts"
_FORMS = (
    "a text, a list of texts, or token ids: whole numbers of shape [n] or [n, length], as a tensor "
    "or as lists"
)


def texts_or_ids(name: str, data: Any) -> list[str] | Tensor:
    """Texts as a list, or token ids int64 `[n]` or `[n, length]`. Raises `LlmqError` for anything
    else."""
    if isinstance(data, str):
        return [data]
    if isinstance(data, list | tuple) and data:
        if all(isinstance(text, str) for text in data):
            return list(data)
        data = _tensor(name, data)
    if hasattr(data, "__array__") and not isinstance(data, Tensor):
        data = torch.as_tensor(data)
    if not isinstance(data, Tensor):
        raise refused(name, data, _FORMS)
    if data.dtype.is_floating_point or data.dtype is torch.bool or data.dim() not in (1, 2):
        shape = list(data.shape)
        raise LlmqError(f"{name}: expected {_FORMS}, got {data.dtype} of shape {shape}")
    return data.to(torch.int64)


def _tensor(name: str, rows: Sequence[Any]) -> Tensor:
    """Lists of whole numbers. Rows of several lengths are no windows, and padding is no text."""
    lengths = {len(row) for row in rows if isinstance(row, list | tuple)}
    if len(lengths) > 1:
        raise LlmqError(
            f"{name}: rows of {min(lengths)} to {max(lengths)} token ids; expected rows of one "
            "length, or one list of ids that is cut into windows"
        )
    flat = [item for row in rows for item in row] if lengths else list(rows)
    odd = [item for item in flat if type(item) is not int]
    if odd:
        raise LlmqError(f"{name}: expected {_FORMS}, got a list with {type(odd[0]).__name__}")
    return torch.tensor(rows, dtype=torch.int64)


def calibration_windows(
    model: ModelLike,
    data: TextOrIds,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
) -> TokenSet:
    """Windows to calibrate a model on: `samples` of `sequence_length` tokens at seeded random
    places of the texts or of a row of ids (`.tokens`, int64 `[samples, length]`). Rows of ids
    `[n, length]` are windows already. Families that need it get a BOS token first.

    tokenizer: in place of the model's own. samples, sequence_length: None for what `llmq quantize`
    takes (see `llmq.ptq.sizing`). Raises `LlmqError` for text shorter than a window."""
    model = opened("model", model)
    usual = sizing.windows_for(model.config)
    recipe = Recipe(
        samples=usual.n_sequences if samples is None else samples,
        sequence_length=usual.length if sequence_length is None else sequence_length,
        seed=seed,
    )
    return token_set(model, data, recipe, tokenizer)


def token_set(
    model: PreTrainedModel | Source,
    data: TextOrIds,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    held_out: bool = False,
) -> TokenSet:
    """`calibration_windows` with samples, length and seed of a recipe. held_out: also windows of
    texts to measure the result on."""
    config, given = model.config, texts_or_ids("calibration", data)
    vocab_size = config.get_text_config().vocab_size
    if isinstance(given, Tensor) and given.dim() == 2:
        check_windows(given, vocab_size)
        check_length(config, given.shape[1], f"calibration windows of {given.shape[1]} tokens")
        return TokenSet(given, GIVEN)
    length = recipe.sequence_length
    check_length(config, length, f"sequence_length {length}")
    if isinstance(given, list):
        text = documents.Text(given, {"source": GIVEN_TEXTS})
        reader = tokenizer_for(model, tokenizer)
        return windows_of(reader, config, recipe, text, GIVEN_TEXTS, held_out=held_out)
    check_vocabulary(given, vocab_size, "calibration")
    bos = first_token(tokenizer_for(model, tokenizer), config) if needs_bos(config) else None
    return documents.calibration_windows(
        given, recipe.samples, recipe.sequence_length, recipe.seed, GIVEN, bos
    )


def windows_for(
    model: PreTrainedModel,
    calibration: TextOrIds | TokenSet | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor | None:
    """The calibration windows of a model in memory, int64 `[n, length]`, None without text."""
    if calibration is None:
        return None
    if isinstance(calibration, TokenSet):
        if calibration.pictures is not None:
            raise LlmqError(
                "calibration: windows with pictures are for folders, llmq.quantize(FOLDER, OUT, "
                "...); give texts or token ids for a model in memory"
            )
        return calibration.tokens
    if isinstance(calibration, str):  # the name of a file for a folder, so better not a text here
        raise refused("calibration", calibration, "a list of texts, such as [text], or token ids")
    if isinstance(calibration, Tensor) and calibration.dim() != 1:
        return calibration  # windows, which are checked with the model
    return token_set(model, calibration, recipe, tokenizer).tokens


def evaluation_windows(
    model: ModelLike,
    data: TextOrIds | Windows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    protocol: str = "gptq",
    sequence_length: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
) -> Windows:
    """Windows to score models on by a protocol of llmq/evaluation/README.md. By `gptq`, texts are
    joined by blank lines and cut into disjoint windows of `sequence_length` tokens, the tail
    dropped. A row of ids is cut alike, windows of ids are taken as they are.

    tokenizer: as in `calibration_windows`. sequence_length: None for 2048 (`llamacpp`: 512), or
    what the model has positions for. stride: of protocol `strided`. bos: see
    `llmq.text.windows.cut_windows`. Raises `LlmqError` for too little text, and for token ids by
    another protocol than `gptq`."""
    rules = protocol_named(protocol)
    if isinstance(data, Windows):
        if protocol not in ("gptq", data.protocol):
            raise LlmqError(
                f"data: windows of protocol {data.protocol}, asked to be scored by {protocol}; "
                "give the text, or leave protocol out"
            )
        return data
    model = opened("model", model)
    config, given = model.config, texts_or_ids("data", data)
    if isinstance(given, list):
        reader = tokenizer_for(model, tokenizer)
        return rules.windows(
            given, reader, config, sequence_length=sequence_length, stride=stride, bos=bos
        )
    if protocol != "gptq":
        raise LlmqError(
            f"data: protocol {protocol} reads texts, got token ids; give texts, or leave protocol "
            "out"
        )
    length = rules.settings(config, sequence_length, stride, bos).sequence_length
    tokens = given if given.dim() == 2 else cut_row(given, length)
    check_windows(tokens, config.get_text_config().vocab_size)
    check_length(config, tokens.shape[1], f"windows of {tokens.shape[1]} tokens")
    return Windows(tokens, "as given", None, None)
