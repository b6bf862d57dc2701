"""A text as tokens, with the bytes of the text that each of them stands for: losses per byte can be
compared between tokenizers, losses per token cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.storage.boundary import reading

_REMEDY = "put the model's own tokenizer files into its folder"


@dataclass(frozen=True)
class Encoded:
    """tokens: int64 `[n]`. n_bytes: of the text in UTF-8, int64 `[n]`, which add up to all of it;
    None where the tokenizer does not say where its tokens stand."""

    tokens: Tensor
    n_bytes: Tensor | None

    def begun_with(self, token: int | None) -> Encoded:
        """The same behind a token that is no text; None for none."""
        if token is None:
            return self
        tokens = torch.cat([torch.tensor([token]), self.tokens])
        none = torch.zeros(1, dtype=torch.int64)
        return Encoded(tokens, None if self.n_bytes is None else torch.cat([none, self.n_bytes]))


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The tokens of a text, special ones that a tokenizer would add left out."""
    where = getattr(tokenizer, "name_or_path", None) or "the tokenizer"
    has_offsets = bool(getattr(tokenizer, "is_fast", False))
    with reading(where, "this tokenizer cannot read the text", _REMEDY):
        found = tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=has_offsets,
            verbose=False,
        )
        tokens = torch.tensor(found["input_ids"], dtype=torch.int64)
    if not has_offsets:
        return Encoded(tokens, None)
    return Encoded(tokens, token_bytes(text, [end for _, end in found["offset_mapping"]]))


def token_bytes(text: str, ends: list[int]) -> Tensor:
    """UTF-8 bytes of the text between the end of each token and that of the one before, int64
    `[n]`; the last one's go to the end of the text. ends: in characters. By the ends, because some
    tokenizers leave the space before a word out of where it begins. A character of several tokens
    counts for the first of them."""
    if not ends:
        return torch.zeros(0, dtype=torch.int64)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])
    last = np.maximum.accumulate(np.asarray(ends))
    last[-1] = len(points)
    return torch.from_numpy(np.diff(before[last], prepend=0))
