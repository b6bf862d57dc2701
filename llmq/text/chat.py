"""Conversations as a model reads them: messages through the chat template of its tokenizer, and the
token that ends a turn.

A message is `{"role": "system" | "user" | "assistant", "content": TEXT}`, as transformers has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.storage.boundary import reading
from llmq.text.illustrated import parts_of

Message = dict[str, str]
_PROBE = "4711PROBE1147"  # an answer that no template writes by itself


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether there is a chat template, whatever it is."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: object
) -> str:
    """A conversation as text, up to where the assistant's answer begins. where: the model, for
    messages. Raises `LlmqError` for what the template refuses, and for a system message that it
    leaves out without a word."""
    remedy = "write its special tokens yourself, as raw text (--raw)"
    if messages[0]["role"] == "system":
        remedy = "leave out --system, or " + remedy
    text = _rendered(tokenizer, messages, where, remedy)
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise LlmqError(
            f"{where}: its chat template has no place for a system message; leave out --system and "
            "say it in the prompt"
        )
    return text


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: object,
    remedy: str,
    *,
    opens_answer: bool = True,
) -> str:
    with reading(where, "its chat template cannot write this conversation", remedy):
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opens_answer
        )
        if not isinstance(text, str):
            raise TypeError(f"it gives {type(text).__name__}, not a text")
        return text


def template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: object
) -> Tensor:
    """Token ids of `template_text`, int64 `[1, T]`. The template writes special tokens itself, so
    the tokenizer adds none. Errors as `template_text`."""
    return text_ids(tokenizer, template_text(tokenizer, messages, where), where, is_whole=True)


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, where: object, *, is_whole: bool = False
) -> Tensor:
    """Token ids of a text, int64 `[1, T]`. is_whole: it has its special tokens already. Raises
    `LlmqError` for what the tokenizer cannot read."""
    with reading(where, "its tokenizer cannot read the prompt", "give another prompt"):
        found: Any = tokenizer(text, return_tensors="pt", add_special_tokens=not is_whole)
        ids: Tensor = found["input_ids"]
        return ids


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the template writes behind an answer, at which generation has to stop whether
    or not the generation config names it. None where it writes none, or cannot write an answer."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = _rendered(tokenizer, messages, "", "", opens_answer=False)
    except LlmqError:
        return None  # who says more than one thing is told so
    _, is_found, behind = text.rpartition(_PROBE)
    if not is_found:
        return None
    behind = behind.lstrip()
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    ends = [token for token in added if token.strip() and behind.startswith(token)]
    return added[max(ends, key=len)] if ends else None


def document_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]]) -> str:
    """A whole conversation by the chat template, answers included. Templates of some multimodal
    models take parts alone; of strings they say nothing, or raise. Raises whatever the template
    does."""
    refused: Exception | None = None
    text = ""
    try:
        text = _applied(tokenizer, turns)
    except Exception as error:  # whatever a template and its filters do
        refused = error
    if _shows(text, turns):
        return text
    try:
        of_parts = _applied(
            tokenizer, [{**turn, "content": parts_of(turn["content"])} for turn in turns]
        )
    except Exception:
        of_parts = ""
    if _shows(of_parts, turns) and "{'type'" not in of_parts:  # or it writes out a list
        return of_parts
    if refused is not None:
        raise refused
    return text


def _applied(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]]) -> str:
    text = tokenizer.apply_chat_template(list(turns), tokenize=False)
    assert isinstance(text, str)
    return text


def _shows(text: str, turns: Sequence[dict[str, Any]]) -> bool:
    """Whether a text has something of what turns say."""
    contents = [turn["content"].strip() for turn in turns]
    return any(content and content in text for content in contents)
