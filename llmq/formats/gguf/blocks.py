"""Blocks of a row of a weight, as ggml stores them: codes and their bytes, both ways.

    Q4_0   32 weights, 18 bytes   d; byte j = c[j] | c[j + 16] << 4          w = d (c - 8)
    Q4_1   32 weights, 20 bytes   d, m; the same bytes                       w = d c + m
    Q8_0   32 weights, 34 bytes   d; int8 c                                  w = d c
    Q2_0   64 weights, 18 bytes   d; byte j = four neighbours, 2 bits each   w = d (c - 1)
    TQ2_0  256 weights, 66 bytes  64 bytes, d; each half of 32 bytes has 4 x 32 codes at
                                  the bits 0, 2, 4, 6                        w = d (c - 1)

d and m are float16. Steps are what is multiplied by d: `c - 8`, `c - 1`, or `c` itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.formats.gguf.tensor_types import BY_NAME, GgmlType

_PAIRS_OF_BITS = (0, 2, 4, 6)


@dataclass(frozen=True)
class Block:
    """A type of blocks whose weights are whole steps of one scale. low, high: the outermost steps;
    the code of a step is `step - low`. put: codes uint8 `[N, B, block]` -> bytes uint8
    `[N, B, n_bytes - 2]`; take: the inverse. scale_last: where the scale stands."""

    type: GgmlType
    low: int
    high: int
    put: Callable[[Tensor], Tensor]
    take: Callable[[Tensor], Tensor]
    scale_last: bool = False

    @property
    def name(self) -> str:
        return self.type.name

    def encode(self, steps: Tensor, scale: Tensor) -> Tensor:
        """Bytes uint8 `[N, row bytes]` of steps (whole numbers from `low` to `high`, `[N, K]`) and
        float16 scales `[N, K / block]`."""
        n, n_blocks = scale.shape
        codes = (steps - self.low).to(torch.uint8).view(n, n_blocks, self.type.block)
        parts = [_bytes_of(scale), self.put(codes)]
        return torch.cat(parts[::-1] if self.scale_last else parts, -1).view(n, -1)

    def decode(self, content: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Steps int16 `[N, K]` and float16 scales `[N, K / block]`: the inverse."""
        blocks = content.view(shape[0], -1, self.type.n_bytes)
        if self.scale_last:
            body, scale = blocks[..., :-2], blocks[..., -2:]
        else:
            scale, body = blocks[..., :2], blocks[..., 2:]
        steps = self.take(body).to(torch.int16) + self.low
        return steps.reshape(shape), _halves(scale)


def _bytes_of(scale: Tensor) -> Tensor:
    """float16 `[N, B]` -> uint8 `[N, B, 2]`."""
    return scale.contiguous().view(torch.uint8).view(*scale.shape, 2)


def _halves(content: Tensor) -> Tensor:
    """The inverse of `_bytes_of`."""
    return content.contiguous().view(torch.float16).squeeze(-1)


def _put_nibbles(codes: Tensor) -> Tensor:
    return codes[..., :16] | codes[..., 16:] << 4


def _take_nibbles(body: Tensor) -> Tensor:
    return torch.cat([body & 15, body >> 4], -1)


def _put_bytes(codes: Tensor) -> Tensor:
    """Codes from 0 to 255 as int8 from -128 to 127."""
    return codes ^ 128


def _put_neighbours(codes: Tensor) -> Tensor:
    fours = codes.unflatten(-1, (-1, 4))
    return sum_of_bits(fours, -1)


def _take_neighbours(body: Tensor) -> Tensor:
    return torch.stack([body >> bit & 3 for bit in _PAIRS_OF_BITS], -1).flatten(-2)


def _put_quarters(codes: Tensor) -> Tensor:
    halves = codes.unflatten(-1, (2, 4, 32))
    return sum_of_bits(halves, -2).flatten(-2)


def _take_quarters(body: Tensor) -> Tensor:
    halves = body.unflatten(-1, (2, 32))
    return torch.stack([halves >> bit & 3 for bit in _PAIRS_OF_BITS], -2).flatten(-3)


def sum_of_bits(codes: Tensor, dim: int) -> Tensor:
    """Four codes of two bits along a dimension as one byte."""
    parts = codes.unbind(dim)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


Q4_0 = Block(BY_NAME["Q4_0"], -8, 7, _put_nibbles, _take_nibbles)
Q8_0 = Block(BY_NAME["Q8_0"], -128, 127, _put_bytes, _put_bytes)
Q2_0 = Block(BY_NAME["Q2_0"], -1, 2, _put_neighbours, _take_neighbours)
TQ2_0 = Block(BY_NAME["TQ2_0"], -1, 2, _put_quarters, _take_quarters, scale_last=True)
Q4_1 = BY_NAME["Q4_1"]
BLOCKS = {block.name: block for block in (Q4_0, Q8_0, Q2_0, TQ2_0)}


def encode_q4_1(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Bytes uint8 `[N, row bytes]` of codes from 0 to 15 `[N, K]` and float16 scales and minima
    `[N, K / 32]`."""
    n, n_blocks = scale.shape
    body = _put_nibbles(codes.to(torch.uint8).view(n, n_blocks, Q4_1.block))
    return torch.cat([_bytes_of(scale), _bytes_of(minimum), body], -1).view(n, -1)


def decode_q4_1(content: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[N, K]`, float16 scales and minima `[N, K / 32]`: the inverse."""
    blocks = content.view(shape[0], -1, Q4_1.n_bytes)
    codes = _take_nibbles(blocks[..., 4:]).reshape(shape)
    return codes, _halves(blocks[..., :2]), _halves(blocks[..., 2:4])


def dequantize(name: str, content: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 `[N, K]` of a type of `BLOCKS`, or of Q4_1, in ggml's arithmetic."""
    if name == Q4_1.name:
        codes, scale, minimum = decode_q4_1(content, shape)
        return _spread(scale, shape) * codes + _spread(minimum, shape)
    steps, scale = BLOCKS[name].decode(content, shape)
    return _spread(scale, shape) * steps


def _spread(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 `[N, K]` of one value for each block."""
    return values.float().repeat_interleave(shape[1] // values.shape[1], 1)
