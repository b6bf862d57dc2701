"""Text from tokens while they come: what may be printed already, and when a text is over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from llmq.messages import escaped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Tokens before a text that decide how its first one is written: sentencepiece leaves out the space
# at the very beginning only, and a character can be spread over four tokens.
CONTEXT = 8
_UNFINISHED = "\ufffd"  # bytes that are no character yet


def continuation(
    tokenizer: Any, ids: Sequence[int], start: int, *, keeps_special: bool = False
) -> str:
    """The text of `ids[start:]` as it goes on from the tokens before."""
    known = list(ids[max(0, start - CONTEXT) : start])
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=not keeps_special)
        for part in (known, [*known, *ids[start:]])
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(list(ids[start:]), skip_special_tokens=not keeps_special)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first place where one of the strings begins."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def n_certain(text: str, stops: Sequence[str]) -> int:
    """How many characters of `text` can be printed, since none of the strings begins in them."""
    for start in range(max(0, len(text) - max(map(len, stops), default=0)), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)


def shown(text: str, stream: TextIO) -> str:
    """Text as it is for a file or a pipe; a terminal must not obey what a model writes."""
    return escaped(text, keep="\n\t") if stream.isatty() else text


class Streamer:
    """Prints a text as it grows, without special tokens, up to the first of `stops`; whole
    characters only. For `generate`, which hands over the prompt first. shows_prompt: print that,
    too."""

    def __init__(
        self,
        tokenizer: Any,
        stream: TextIO | None = None,
        *,
        stops: Sequence[str] = (),
        shows_prompt: bool = False,
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = sys.stdout if stream is None else stream
        self._shows_prompt = shows_prompt
        self._ids: list[int] = []
        self._n_done = 0  # tokens whose text is in `_waiting` or printed
        self._waiting = ""  # may be the beginning of a stop
        self._is_over = False

    def put(self, value: Tensor) -> None:
        """value: tokens `[1, T]` of the prompt, then `[1]` of each new one."""
        is_prompt = not self._ids
        self._ids += value.reshape(-1).tolist()
        if is_prompt:
            self._n_done = len(self._ids)
            if self._shows_prompt:
                self._print(self._tokenizer.decode(self._ids, skip_special_tokens=True))
            return
        text = continuation(self._tokenizer, self._ids, self._n_done)
        if text and not text.endswith(_UNFINISHED):
            self._add(text)

    def end(self) -> None:
        """Print what was waiting, and end the line."""
        self._add(continuation(self._tokenizer, self._ids, self._n_done))
        self._print("" if self._is_over else self._waiting)
        self._print("\n")

    def _add(self, text: str) -> None:
        self._n_done = len(self._ids)
        if self._is_over:
            return
        text = self._waiting + text
        kept = cut(text, self._stops)
        self._is_over = kept != text
        n_printed = len(kept) if self._is_over else n_certain(kept, self._stops)
        self._print(kept[:n_printed])
        self._waiting = kept[n_printed:]

    def _print(self, text: str) -> None:
        print(shown(text, self._stream), end="", flush=True, file=self._stream)


class StopAt:
    """A stopping criterion: a text is over when it holds one of `stops`, special tokens in it
    included, or when it `is_asked_to`."""

    def __init__(self, tokenizer: Any, n_prompt: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._n_prompt, self._stops = tokenizer, n_prompt, stops
        # A token has a byte at least, but for those that are written as nothing.
        self._reach = CONTEXT + max((len(stop.encode()) for stop in stops), default=0)
        self.is_asked_to = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """`[B]`, of rows `[B, T]`."""
        import torch

        found = [self.is_asked_to or self.ends(row) for row in input_ids.tolist()]
        over: Any = torch.tensor(found, dtype=torch.bool, device=input_ids.device)
        return over

    def ends(self, row: list[int]) -> bool:
        """Whether the last tokens of a row hold a stop."""
        if not self._stops:
            return False
        start = max(self._n_prompt, len(row) - self._reach)
        text = continuation(self._tokenizer, row, start, keeps_special=True)
        return any(stop in text for stop in self._stops)
