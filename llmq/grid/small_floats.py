"""Floats of few bits as the numbers they stand for (OCP Microscaling Formats, 2023).

E2M1   4 bits, two to a byte, the first in the low half
E8M0   8 bits of exponent alone: powers of two, by their exponent + 127"""

from __future__ import annotations

import torch
from torch import Tensor

# E2M1 by its low three bits: two of exponent, one of mantissa; the fourth is the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127
_HALF_BITS = 4
_E8M0_NAN = 255


def e2m1_values(packed: Tensor) -> Tensor:
    """float32 `[..., 2 n]` of bytes `[..., n]`."""
    stored = packed.view(torch.uint8)
    halves = torch.stack([stored & 15, stored >> _HALF_BITS], dim=-1).flatten(-2)
    table = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], device=packed.device)
    return table[halves.int()]


def e8m0_values(stored: Tensor) -> Tensor:
    """float32 of bytes; NaN for the one that says so."""
    exponents = stored.view(torch.uint8)
    values = torch.exp2(exponents.float() - _E8M0_BIAS)
    return values.masked_fill(exponents == _E8M0_NAN, torch.nan)
