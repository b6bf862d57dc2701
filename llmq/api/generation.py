"""`llmq.generate`: text for a text, a conversation, or token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.api.models import ModelLike, opened, tokenizer_for
from llmq.api.texts import texts_or_ids
from llmq.arguments import check_type, refused
from llmq.errors import LlmqError
from llmq.formats.load import load
from llmq.inference import decoding
from llmq.inference.decoding import end_ids, ending_also_at
from llmq.models.arch import check_length
from llmq.models.source import Source
from llmq.text.chat import has_template, template_ids, text_ids, turn_end
from llmq.text.documents import check_vocabulary

Message: TypeAlias = Mapping[str, str]
_PROMPTS = (
    "a text to go on from, a conversation as a list of {'role': ..., 'content': ...}, or token ids "
    "as a tensor of shape [T] or [B, T]"
)


@overload
def generate(
    model: ModelLike,
    prompt: str | Sequence[Message],
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    seed: int | None = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    **options: Any,
) -> str: ...


@overload
def generate(
    model: ModelLike,
    prompt: Tensor,
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    seed: int | None = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    **options: Any,
) -> Tensor: ...


def generate(
    model: Any,
    prompt: Any,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Any:
    """What a model writes: the new text for a text or a conversation, all token ids
    `[B, T + new]` for token ids.

        llmq.generate("tiny", "def main():")
        llmq.generate(model, [{"role": "user", "content": "Who are you?"}], temperature=0.7)

    model: in memory, or the name of one, which is loaded and made ready for decoding; one in memory
    is made faster by `llmq.prepare_decoding`. prompt: a text is gone on from as it is; a
    conversation goes through the model's chat template, and ends where that ends a turn.
    temperature: 0 for the likeliest token each
    time. seed: of the sampling, leaving torch's own as it is. tokenizer: in place of the model's.
    options: anything that `generate` of transformers takes. Raises `LlmqError`."""
    model = opened("model", model)
    check_type("max_new_tokens", max_new_tokens, int, "a whole number")
    check_type("temperature", temperature, (int, float), "a number, at least 0")
    if isinstance(prompt, Tensor):
        ids, reader = texts_or_ids("prompt", prompt), None
    else:
        reader = tokenizer_for(model, tokenizer)
        ids = _read(reader, prompt)
    assert isinstance(ids, Tensor)
    if isinstance(model, Source):
        model = decoding.prepare_decoding(load(model))
    ids = (ids if ids.dim() == 2 else ids[None]).to(model.device)
    n_tokens = ids.shape[1]
    _check(model, ids, max_new_tokens)
    if reader is not None and not isinstance(prompt, str) and model.generation_config is not None:
        options = ending_also_at(model.generation_config, turn_end(reader)) | options
    options = _sampling(temperature) | _padding(model, reader) | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = decoding.generate(model, ids, max_new_tokens, **options)
    if reader is None:
        return output
    return reader.decode(output[0, n_tokens:], skip_special_tokens=True)


def _check(model: PreTrainedModel, ids: Tensor, max_new_tokens: int) -> None:
    n_tokens = ids.shape[1]
    if not n_tokens:
        raise LlmqError("prompt: no tokens; give some text to go on from")
    if max_new_tokens < 1:
        raise refused("max_new_tokens", max_new_tokens, "1 or more")
    check_vocabulary(ids, model.config.get_text_config().vocab_size, "prompt")
    what = f"prompt of {n_tokens} tokens and {max_new_tokens} new ones"
    check_length(model.config, n_tokens + max_new_tokens, what, "give fewer max_new_tokens")


def _read(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> Tensor:
    """Token ids `[1, T]` of a text or a conversation."""
    is_text = isinstance(prompt, str)
    if not is_text and not _is_conversation(prompt):
        raise refused("prompt", prompt, _PROMPTS)
    if not is_text and not has_template(tokenizer):
        raise LlmqError(
            "prompt: a conversation, but this tokenizer has no chat template; give a text, or "
            "set tokenizer.chat_template"
        )
    if is_text:
        return text_ids(tokenizer, prompt, "prompt")
    return template_ids(tokenizer, [dict(message) for message in prompt], "prompt")


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list | tuple)
        and bool(prompt)
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def _sampling(temperature: float) -> dict[str, Any]:
    if not 0 <= temperature < float("inf"):
        raise refused("temperature", temperature, "a number, at least 0")
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What fills up the row of a text that ended, where the model does not say: its end of
    sequence, as transformers chooses it too, after a warning."""
    stored = model.generation_config
    if stored is None or stored.pad_token_id is not None:
        return {}
    known = [*end_ids(stored.eos_token_id), None if tokenizer is None else tokenizer.eos_token_id]
    return {"pad_token_id": next((token for token in known if token is not None), None)}
