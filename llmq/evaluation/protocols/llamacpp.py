"""Protocol `llamacpp`, that of llama.cpp's `llama-perplexity`: disjoint windows, the second half of
each scored, so that every target has at least half a window of context.

The text is one file; documents are joined by blank lines, and one line break at the very end is
left out. Where the vocabulary adds a BOS token, it takes the place of the first token of every
window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmq.evaluation.protocols.base import Protocol, Settings, Span, check_enough, row_windows
from llmq.text.encoding import encode
from llmq.text.windows import Bos, Windows, added_bos, resolve_bos

USUAL_LENGTH = 512


def spans_of(n_tokens: int, length: int) -> list[Span]:
    """Disjoint windows of `length` tokens; what does not fill one is dropped."""
    starts = range(0, n_tokens - length + 1, length)
    return [Span(start, start + length // 2 + 1, start + length) for start in starts]


def cut(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, config: Any, settings: Settings
) -> Windows:
    """The windows of a text. Raises `LlmqError` for fewer than two."""
    bos: Bos = settings.bos
    if bos == "auto" and added_bos(tokenizer) is not None:
        bos = "every-window"
    policy, begin = resolve_bos(bos, tokenizer, config)
    text = "\n\n".join(documents).removesuffix("\n")
    row = encode(text, tokenizer).begun_with(begin)
    length = settings.sequence_length
    check_enough(len(row.tokens), 2 * length, PROTOCOL.name)
    windows = row_windows(documents, tokenizer, row, spans_of(len(row.tokens), length), policy)
    return replace(windows, protocol=PROTOCOL.name, settings={"sequence_length": length})


PROTOCOL = Protocol("llamacpp", cut, usual_length=USUAL_LENGTH, least_length=3)
