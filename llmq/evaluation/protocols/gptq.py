"""Protocol `gptq`, that of most papers on quantization: all documents joined by blank lines, cut
into disjoint windows of T tokens, the tail dropped, T - 1 targets each."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from llmq.evaluation.protocols.base import Protocol, Settings
from llmq.text.windows import Windows, cut_windows


def cut(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, config: Any, settings: Settings
) -> Windows:
    """The windows of a text."""
    return cut_windows(documents, tokenizer, config, settings.sequence_length, settings.bos)


PROTOCOL = Protocol("gptq", cut)
