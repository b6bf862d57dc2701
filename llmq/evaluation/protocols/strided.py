"""Protocol `strided`, that of the guide of transformers to perplexity: windows that overlap, so
that every token is scored once, and with context but in the first window.

Losses are added up over the targets that there are. The guide's own snippet takes the mean of each
window times one target less than it has, which is right for the first window alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmq.evaluation.protocols.base import Protocol, Settings, Span, check_enough, row_windows
from llmq.text.encoding import encode
from llmq.text.windows import Windows, resolve_bos


def spans_of(n_tokens: int, length: int, stride: int) -> list[Span]:
    """Windows of `length` tokens, each `stride` further than the one before, up to the end of a row
    of `n_tokens`; each is scored on what the one before did not reach."""
    spans, reached = [], 1  # nothing predicts the first token
    for start in range(0, n_tokens, stride):
        end = min(start + length, n_tokens)
        spans.append(Span(start, max(reached, start + 1), end))
        reached = end
        if end == n_tokens:
            break
    return [span for span in spans if span.first < span.end]


def cut(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, config: Any, settings: Settings
) -> Windows:
    """The windows of a text."""
    assert settings.stride is not None
    policy, begin = resolve_bos(settings.bos, tokenizer, config)
    row = encode("\n\n".join(documents), tokenizer).begun_with(begin)
    length, stride = settings.sequence_length, settings.stride
    check_enough(len(row.tokens), length, PROTOCOL.name)
    spans = spans_of(len(row.tokens), length, stride)
    windows = row_windows(documents, tokenizer, row, spans, policy)
    told = {"sequence_length": length, "stride": stride}
    return replace(windows, protocol=PROTOCOL.name, settings=told)


PROTOCOL = Protocol("strided", cut, usual_stride=512)
