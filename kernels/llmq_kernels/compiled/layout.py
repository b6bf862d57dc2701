"""The one layout in memory of a weight that the compiled CPU kernels read.

Rows are taken in bands of 16, columns in blocks, and a band's blocks follow each other, so that a
kernel reads one stream from beginning to end:

    [bands, blocks, 16 rows, 64 bytes]        codes of 8, 4 and 2 bits: 64, 128 and 256 columns in a
                                              block
    [bands, blocks, 16 rows, 64 + 32 bytes]   codes of 3 bits: 256 columns; first all rows' 64 bytes
                                              of the two low bits, then all rows' 32 bytes of the
                                              high one

Byte j of a row's 64 holds columns j, 64 + j, 128 + j ... of the block in its fields from the low
bits up: one shift and one mask give 64 consecutive columns as bytes, in order. That is what integer
products want. The bfloat16 kernels look codes up in a table and take bytes as 16-bit lanes, low and
high byte one after the other, which merely orders columns differently on both sides of the product.

Scales are float32 `[bands, groups, 16]`, beside them, where there are zero points, `-scale * zero`.
Rows and columns that pad the last band and block have scale 0; scales for groups of more than 128
columns are stored once per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BAND = 16
CHUNK = 64


@dataclass(frozen=True)
class Layout:
    """Sizes for `[n, k]` codes of `bits` bits. Bands come in pairs."""

    bits: int
    n: int
    k: int

    @property
    def fields(self) -> int:
        """Codes per byte of the low plane."""
        return 4 if self.bits == 3 else 8 // self.bits

    @property
    def columns(self) -> int:
        """Columns in a block."""
        return CHUNK * self.fields

    @property
    def n_blocks(self) -> int:
        return -(-self.k // self.columns)

    @property
    def n_bands(self) -> int:
        return -(-self.n // (2 * BAND)) * 2

    @property
    def k_padded(self) -> int:
        return self.n_blocks * self.columns

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one band."""
        return BAND * (96 if self.bits == 3 else 64)


def arrange(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[n, k]` as `[bands, blocks, block_bytes]`."""
    n, k = codes.shape
    layout = Layout(bits, n, k)
    padded = torch.nn.functional.pad(codes, (0, layout.k_padded - k, 0, layout.n_bands * BAND - n))
    blocks = padded.view(layout.n_bands, BAND, layout.n_blocks, layout.fields, CHUNK).transpose(
        1, 2
    )  # [bands, blocks, 16, fields, 64]
    width = 8 // layout.fields
    low = torch.zeros(*blocks.shape[:3], CHUNK, dtype=torch.uint8)
    for field in range(layout.fields):
        low |= (blocks[..., field, :] & ((1 << width) - 1)) << (width * field)
    out = low.flatten(2)
    if bits == 3:
        bit = (blocks >> 2).reshape(*blocks.shape[:3], 32, 8) << torch.arange(8, dtype=torch.uint8)
        out = torch.cat((out, bit.sum(-1, dtype=torch.uint8).flatten(2)), dim=-1)
    return out.contiguous()


def restore_codes(stored: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `arrange`."""
    layout = Layout(bits, n, k)
    shape = (layout.n_bands, layout.n_blocks, BAND)
    width = 8 // layout.fields
    low = stored[..., : BAND * 64].reshape(*shape, CHUNK)
    codes = torch.stack(
        [(low >> (width * field)) & ((1 << width) - 1) for field in range(layout.fields)], dim=3
    )
    if bits == 3:
        high = stored[..., BAND * 64 :].reshape(*shape, 32, 1)
        codes |= (((high >> torch.arange(8, dtype=torch.uint8)) & 1) << 2).view(codes.shape)
    return (
        codes.transpose(1, 2).reshape(layout.n_bands * BAND, layout.k_padded)[:n, :k].contiguous()
    )


def rows_of(stored: Tensor, bits: int, k: int, index: Tensor) -> Tensor:
    """uint8 codes `[n, k]` of the rows in index, int64 `[n]`."""
    layout = Layout(bits, len(stored) * BAND, k)
    band, row, width = index // BAND, index % BAND, 8 // layout.fields
    low = stored[..., : BAND * CHUNK].unflatten(-1, (BAND, CHUNK))[band, :, row]
    fields = [(low >> (width * field)) & ((1 << width) - 1) for field in range(layout.fields)]
    codes = torch.stack(fields, dim=2)  # [n, blocks, fields, 64]
    if bits == 3:
        high = stored[..., BAND * CHUNK :].unflatten(-1, (BAND, 32, 1))[band, :, row]
        codes |= (((high >> torch.arange(8, dtype=torch.uint8)) & 1) << 2).view(codes.shape)
    return codes.flatten(1)[:, :k].contiguous()


def arrange_scale(values: Tensor, n: int, n_bands: int) -> Tensor:
    """Values per row and group `[n or 1, groups]` as float32 `[bands, groups, 16]`, zero in the
    rows that pad."""
    padded = torch.zeros(n_bands * BAND, values.shape[1], dtype=torch.float32)
    padded[:n] = values.float().expand(n, -1)
    return padded.view(n_bands, BAND, -1).transpose(1, 2).contiguous()
