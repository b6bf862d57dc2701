"""`llmq.perplexity` and `llmq.compare` on text, in whatever form it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from llmq.api.models import ModelLike, in_memory, opened
from llmq.api.texts import TextOrIds, evaluation_windows
from llmq.arguments import refused
from llmq.evaluation import divergence
from llmq.evaluation.perplexity import Perplexity, evaluate
from llmq.text.windows import Bos, Windows


@overload
def perplexity(
    model: ModelLike,
    data: TextOrIds | Windows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    protocol: str = ...,
    sequence_length: int | None = ...,
    stride: int | None = ...,
    bos: Bos = ...,
) -> Perplexity: ...


@overload
def perplexity(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase,
    text: TextOrIds,
    /,
    *,
    protocol: str = ...,
    sequence_length: int | None = ...,
    stride: int | None = ...,
    bos: Bos = ...,
) -> Perplexity: ...


def perplexity(
    model: Any,
    data: Any = None,
    text: Any = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    protocol: str = "gptq",
    sequence_length: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
) -> Perplexity:
    """Perplexity of a model by a protocol (`.value`, `.ci95`, `.bits_per_byte`, `.to_json()`); by
    `gptq`: disjoint windows, all but the first token of each scored.

        llmq.perplexity(model, text)
        llmq.perplexity("tiny", ["a text", "another"], sequence_length=128)
        llmq.perplexity(model, token_ids)
        llmq.perplexity(model, text, protocol="strided", stride=256)

    model: in memory, or the name of one, which is loaded in float32. data: a text, a list of texts
    (joined by blank lines), token ids, or windows. tokenizer: in place of the model's own;
    `perplexity(model, tokenizer, text)` says the same. protocol: `gptq`, `strided`, `llamacpp` or
    `words`, see llmq/evaluation/README.md. sequence_length: tokens per window; None for 2048
    (`llamacpp`: 512), or what the model has positions for. stride: of protocol `strided`. bos: see
    `llmq.text.windows.cut_windows`. Raises `LlmqError` for too little text."""
    if isinstance(data, PreTrainedTokenizerBase):
        tokenizer, data = data, text
    elif data is None:
        data = text
    elif text is not None:
        raise refused("text", text, "nothing behind a text that is given already")
    model = opened("model", model)
    windows = evaluation_windows(
        model,
        data,
        tokenizer=tokenizer,
        protocol=protocol,
        sequence_length=sequence_length,
        stride=stride,
        bos=bos,
    )
    return evaluate(in_memory(model), windows)


def compare(
    base: ModelLike,
    quant: ModelLike,
    data: TextOrIds | Windows,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_length: int | None = None,
    bos: Bos = "auto",
) -> dict[str, Any]:
    """How far a quantized model is from its base on a text: perplexity ratio with a paired 95%
    interval, KL(base || quant) in nats, top-1 agreement, RMS change of the target's probability.

    base, quant: in memory, or names of models, which are loaded in float32. data, sequence_length,
    bos: as in `perplexity`. tokenizer: in place of the base's own. on_batch: told how many windows
    are done, of how many. Raises `LlmqError` when the models have different vocabularies."""
    stored = opened("base", base), opened("quant", quant)
    windows = evaluation_windows(
        stored[0], data, tokenizer=tokenizer, sequence_length=sequence_length, bos=bos
    )
    models = in_memory(stored[0]), in_memory(stored[1])
    return divergence.compare(*models, windows, on_batch)
