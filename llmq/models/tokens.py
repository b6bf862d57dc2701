"""The tokenizer of a model: whether it is its own, and the token that its windows begin with."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError, LlmqWarning
from llmq.models.arch import needs_bos
from llmq.models.source import Source

# Rows of the embeddings beyond the tokenizer's tokens that are padding: vocabularies are rounded up
# to multiples of 64 to 512, and published models leave up to 2.4% of theirs empty.
PADDING_ROWS = 256
PADDING_SHARE = 0.1
# Files of which a folder with a tokenizer has at least one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
FINGERPRINT = "tokenizer_sha256"  # of the vocabulary, in the report of a quantized folder


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary: tokens with their ids, in the order of the tokens."""
    vocabulary = "\n".join(
        f"{token}\t{index}" for token, index in sorted(tokenizer.get_vocab().items())
    )
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()


def own_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, after a look at whether it is that of this model: by the size of
    its vocabulary, by its special tokens, and by what the folder's report says of it. Raises
    `LlmqError` for one of another model, and warns where only its special tokens differ."""
    tokenizer = source.tokenizer
    check_size(tokenizer, source.config, source.folder)
    _check_report(tokenizer, source.folder)
    _compare_special_tokens(tokenizer, source.config, source.folder)
    return tokenizer


def check_size(tokenizer: PreTrainedTokenizerBase, config: Any, where: object) -> None:
    """Raise `LlmqError` for a tokenizer with far more or far fewer tokens than the model has
    embeddings: it is that of another model, even if a text happens to use small ids only."""
    n_tokens, n_rows = len(tokenizer), config.get_text_config().vocab_size
    room = max(PADDING_ROWS, int(PADDING_SHARE * n_rows))
    if n_tokens > n_rows + room:
        reason = f"ids beyond the model's vocabulary of {n_rows}"
    elif n_tokens < n_rows - room:
        reason = f"the model embeddings for {n_rows}"
    else:
        return
    raise LlmqError(
        f"{where}: the tokenizer has {n_tokens} tokens and {reason}; it does not belong to this "
        "model: put its own into the folder"
    )


def _check_report(tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> None:
    """The folder's own report knows the tokenizer that its text was read with."""
    try:
        expected = json.loads((model_dir / "report.json").read_text()).get(FINGERPRINT)
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(expected, str) and expected != fingerprint(tokenizer):
        raise LlmqError(
            f"{model_dir}: the tokenizer is not the one that this model was quantized with "
            "(report.json knows another vocabulary); put its own into the folder"
        )


def _compare_special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: Any, model_dir: Path
) -> None:
    """Warn when none of the special tokens that both know is the same."""
    pairs = []
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name, None), getattr(config.get_text_config(), name, None)
        theirs = theirs if isinstance(theirs, list) else [theirs]
        if ours is not None and theirs != [None]:
            pairs.append((name, ours, theirs))
    if pairs and all(ours not in theirs for _, ours, theirs in pairs):
        name, ours, theirs = pairs[0]
        warnings.warn(
            f"{model_dir}: the tokenizer has {name} {ours} and config.json "
            f"{', '.join(map(str, theirs))}; if it is that of another model, every figure is wrong",
            LlmqWarning,
            stacklevel=3,
        )


def check_same_tokenizer(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Raise `LlmqError` for two tokenizers with other tokens: the same ids would be other texts."""
    if fingerprint(first) != fingerprint(second):
        raise LlmqError(
            f"{names[1]}: its tokenizer has other tokens than that of {names[0]}; the two models "
            "can only be compared on the same tokens, so put the same tokenizer into both folders"
        )


def bos_token(tokenizer: PreTrainedTokenizerBase, config: Any) -> int | None:
    """The token that begins a window: the tokenizer's, else the one that the config knows, else
    None."""
    text_config = config.get_text_config()
    for token in (tokenizer.bos_token_id, getattr(text_config, "bos_token_id", None)):
        if isinstance(token, int) and 0 <= token < text_config.vocab_size:
            return token
    return None


def first_token(tokenizer: PreTrainedTokenizerBase, config: Any) -> int | None:
    """The token that every window of a family begins with that is broken without it, None for the
    other families. Raises `LlmqError` where neither tokenizer nor config knows one."""
    if not needs_bos(config):
        return None
    token = bos_token(tokenizer, config)
    if token is None:
        raise LlmqError(
            f"{config.get_text_config().model_type} needs a BOS token at the start of every "
            "window, and neither its tokenizer nor config.json (bos_token_id) has one; put the "
            "model's own tokenizer into the folder"
        )
    return token
