"""Windows that a model is not calibrated on, to tell what quantization cost from how well it fits
its calibration text: some of that text, and some of another kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.storage.boundary import reading
from llmq.text.corpus import BUNDLED, standard_library_documents
from llmq.text.documentation import topics_of_the_language

SAME, OTHER = "calibration", "other"
N_WINDOWS, MAX_LENGTH = 8, 256
CHARACTERS_PER_TOKEN = 12  # two to three times what tokenizers make of the bundled texts


@dataclass(frozen=True)
class HeldOutText:
    """kind: `SAME`, like what is calibrated on, or `OTHER`. source: which text. tokens: int64
    `[n, T]`."""

    kind: str
    source: str
    tokens: Tensor


def window_starts(n_tokens: int, n_samples: int, length: int, seed: int) -> Tensor:
    """Where the calibration windows of a row of tokens begin, int64 `[n_samples]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_tokens - length + 1, (n_samples,), generator=generator)


def held_out_texts(
    row: Tensor, starts: Tensor, length: int, source: str, tokenizer: PreTrainedTokenizerBase
) -> list[HeldOutText]:
    """Windows of a text beside those that are calibrated on, and of another kind of text. row: of
    tokens. starts, length: of the calibration windows in it. source: where the text is from."""
    size = min(MAX_LENGTH, length)
    if source == BUNDLED:
        return bundled_texts(True, tokenizer, size)
    free = free_windows(row, starts, length, size, N_WINDOWS)
    return [HeldOutText(SAME, source, free), *bundled_texts(False, tokenizer, size)]


def free_windows(row: Tensor, starts: Tensor, length: int, size: int, n_windows: int) -> Tensor:
    """Up to `n_windows` windows `[n, size]` of a row of tokens, spread evenly, that share no token
    with the windows of `length` that begin at `starts`."""
    edges = torch.zeros(len(row) + 1, dtype=torch.int64)
    edges.index_add_(0, starts, torch.ones_like(starts))
    edges.index_add_(0, starts + length, -torch.ones_like(starts))
    is_taken = edges.cumsum(0)[:-1] > 0
    marked = torch.cat([torch.tensor([True]), is_taken, torch.tensor([True])])
    borders = (marked[1:] != marked[:-1]).nonzero()[:, 0].tolist()
    free: list[int] = []
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        free += range(begin, end - size + 1, size)
    if len(free) > n_windows:
        free = [free[i * len(free) // n_windows] for i in range(n_windows)]
    begins = torch.tensor(free, dtype=torch.int64)
    return row[begins[:, None] + torch.arange(size)]


@cache
def _source_code() -> str:
    """Modules of Python that the bundled calibration text has not."""
    return "\n\n".join(standard_library_documents("eval"))


@cache
def _documentation() -> str:
    return "\n\n".join(topics_of_the_language())


def bundled_texts(
    is_code: bool, tokenizer: PreTrainedTokenizerBase, size: int
) -> list[HeldOutText]:
    """Windows `[N_WINDOWS, size]` of texts that every Python has. is_code: the model is calibrated
    on its source: then other modules of it are of the same kind, and its documentation of another;
    else the source is of another kind."""
    code = _excerpts(_source_code(), tokenizer, size, N_WINDOWS)
    if not is_code:
        return [HeldOutText(OTHER, "Python source", code)]
    documentation = _excerpts(_documentation(), tokenizer, size, N_WINDOWS)
    return [
        HeldOutText(SAME, "Python source", code),
        HeldOutText(OTHER, "Python documentation", documentation),
    ]


def _excerpts(text: str, tokenizer: PreTrainedTokenizerBase, size: int, n_windows: int) -> Tensor:
    """Windows of a long text, spread evenly; only they are tokenized."""
    room = size * CHARACTERS_PER_TOKEN
    starts = [i * (len(text) - room) // n_windows for i in range(n_windows)]
    parts = [text[start : start + room] for start in starts]
    where = getattr(tokenizer, "name_or_path", None) or "the tokenizer"
    remedy = "put the model's own tokenizer files into its folder"
    with reading(where, "this tokenizer cannot read the text", remedy):
        ids = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [row[:size] for row in ids if len(row) >= size]
    return torch.tensor(rows, dtype=torch.int64).view(-1, size)


def begun_with(text: HeldOutText, bos: int | None) -> HeldOutText:
    """The windows with a token in the first place, for the families that need it."""
    if bos is not None:
        text.tokens[:, 0] = bos
    return text
