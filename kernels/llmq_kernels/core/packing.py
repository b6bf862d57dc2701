"""The one storage layout: codes `[N, K]` as a continuous little-endian bitstream along K, in int32
words `[N, ceil(K * bits / 32)]`.

The stream repeats every lcm(bits, 32) bits: 8 codes in 1 word at 4 bits, 32 codes in 3 words at 3
bits. So packing is a short loop over the codes of one period (at most 32), each step a shift and an
"or" over all periods of all rows at once; no loop touches single elements. GPTQ's `qweight` is this
layout transposed, compressed-tensors' `weight_packed` is this layout as it is, at every bit width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

WORD_BITS = 32


def packed_width(n_codes: int, bits: int) -> int:
    """The number of int32 words that hold `n_codes` codes of `bits` bits."""
    return -(-n_codes * bits // WORD_BITS)


def _lanes(bits: int) -> tuple[int, int, Iterator[tuple[int, int, int]]]:
    """Codes and words of one period, and for each code its (position, word, bit offset in that
    word)."""
    divisor = math.gcd(bits, WORD_BITS)
    n_codes, n_words = WORD_BITS // divisor, bits // divisor
    return (
        n_codes,
        n_words,
        ((j, j * bits // WORD_BITS, j * bits % WORD_BITS) for j in range(n_codes)),
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes `[N, K]`, each in `0 .. 2^bits - 1` (not checked here), into int32 `[N,
    packed_width(K, bits)]`. Unused bits are zero."""
    n, k = codes.shape
    period, words_per_period, lanes = _lanes(bits)
    n_periods = -(-k // period)
    padded = torch.nn.functional.pad(codes, (0, n_periods * period - k)).view(n, n_periods, period)
    # int32 shifts wrap bits into the sign, which is the word we want; a code that straddles two
    # words leaves its high part in the next one.
    words = torch.zeros(n, n_periods, words_per_period, dtype=torch.int32, device=codes.device)
    for j, word, offset in lanes:
        lane = padded[:, :, j].to(torch.int32)
        words[:, :, word] |= lane << offset
        if offset + bits > WORD_BITS:
            words[:, :, word + 1] |= lane >> (WORD_BITS - offset)
    return words.view(n, -1)[:, : packed_width(k, bits)].contiguous()


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of `pack`: uint8 codes `[N, k]` from int32 words `[N, >= packed_width(k,
    bits)]`."""
    n = packed.shape[0]
    period, words_per_period, lanes = _lanes(bits)
    n_periods = -(-k // period)
    padding = n_periods * words_per_period - packed.shape[1]
    words = torch.nn.functional.pad(packed, (0, padding)).view(n, n_periods, words_per_period)
    codes = torch.empty(n, n_periods, period, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for j, word, offset in lanes:
        # The arithmetic shift drags the sign in from the left; the mask removes it, except where
        # the code continues in the next word.
        low = words[:, :, word] >> offset
        if offset + bits > WORD_BITS:
            low_bits = WORD_BITS - offset
            low = (low & ((1 << low_bits) - 1)) | (words[:, :, word + 1] << low_bits)
        codes[:, :, j] = (low & mask).to(torch.uint8)
    return codes.view(n, -1)[:, :k].contiguous()
