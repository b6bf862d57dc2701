"""How a quantized weight is stored in blocks: exactly, or why not.

Steps are whole numbers of one scale: `code - zero`, or a multiple of it where the block's steps are
others (-1 turns 2 bits around, 2 makes whole steps of half ones); the scale is divided by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.formats.changes import Distance
from llmq.formats.gguf.blocks import (
    BLOCKS,
    Q2_0,
    Q4_0,
    Q4_1,
    Q8_0,
    TQ2_0,
    Block,
    dequantize,
    encode_q4_1,
)
from llmq.formats.gguf.tensor_types import BY_NAME, GgmlType
from llmq.grid.rounding import dequantize as values_of
from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.core.packing import unpack

# By code and symmetry: the blocks that hold every step of it, the smallest first, and the multiple.
_WAYS: dict[tuple[str, bool], tuple[tuple[Block, int], ...]] = {
    ("ternary", True): ((TQ2_0, 1), (Q2_0, 1), (Q4_0, 1)),
    ("int2", True): ((Q2_0, -1), (Q4_0, 1)),
    ("int2", False): ((Q4_0, 1),),
    ("int2h", True): ((Q4_0, 2),),
    ("int3", True): ((Q4_0, 1),),
    ("int3", False): ((Q4_0, 1),),
    ("int4", True): ((Q4_0, 1),),
    ("int5", True): ((Q8_0, 1),),
    ("int5", False): ((Q8_0, 1),),
    ("int6", True): ((Q8_0, 1),),
    ("int6", False): ((Q8_0, 1),),
    ("int8", True): ((Q8_0, 1),),
}
_CHUNK = 1 << 24  # weights that are unpacked at a time


@dataclass(frozen=True)
class Fit:
    """type: of the blocks. multiple: see above. reason: why the stored values are not those of the
    weight, None where they are. keeps_codes: whether the codes are stored as they are; else the
    values are rounded anew."""

    type: GgmlType
    multiple: int = 1
    reason: str | None = None
    keeps_codes: bool = True


def fit(qtensor: QuantizedTensor) -> Fit:
    """The smallest blocks that hold a weight exactly; else the nearest ones, with the reason."""
    spec, shape = qtensor.spec, qtensor.shape
    if qtensor.g_idx is not None and spec.n_groups(shape[1]) > 1:
        reason = "its columns are not in the order of their groups (act-order)"
        return _requantized(shape, reason)
    if (spec.code, spec.symmetric) == ("int4", False):
        return _fit_q4_1(qtensor)
    ways = _WAYS.get((spec.code, spec.symmetric))
    if ways is None:
        return _requantized(shape, f"no type of blocks has the levels of {spec}")
    for block, multiple in ways:
        if not _divides(block.type, spec, shape):
            continue
        n_rounded = _n_rounded(qtensor.scale.float() / multiple)
        n = qtensor.scale.numel()
        return Fit(block.type, multiple, _rounded("scales", n_rounded, n) if n_rounded else None)
    return _requantized(shape, _no_blocks(ways[-1][0].type, spec, shape))


def _divides(kind: GgmlType, spec: QuantSpec, shape: tuple[int, int]) -> bool:
    """Whether no block reaches over the end of a group or of a row."""
    return shape[1] % kind.block == 0 and spec.columns_per_group(shape[1]) % kind.block == 0


def _no_blocks(kind: GgmlType, spec: QuantSpec, shape: tuple[int, int]) -> str:
    return f"blocks of {kind.block} do not divide the groups of {spec} in {shape[1]} columns"


def _requantized(shape: tuple[int, int], reason: str) -> Fit:
    """Of 8 bits, which are close to any other; in full where not even these divide a row."""
    kind = Q8_0.type if shape[1] % Q8_0.type.block == 0 else BY_NAME["F32"]
    return Fit(kind, reason=reason, keeps_codes=False)


def _fit_q4_1(qtensor: QuantizedTensor) -> Fit:
    """4 bits with zero points: `m = -d z` has to be a float16 number."""
    if not _divides(Q4_1, qtensor.spec, qtensor.shape):
        return _requantized(qtensor.shape, _no_blocks(Q4_1, qtensor.spec, qtensor.shape))
    n = qtensor.scale.numel()
    if n_rounded := _n_rounded(qtensor.scale.float()):
        return Fit(Q4_1, reason=_rounded("scales", n_rounded, n))
    if n_rounded := _n_rounded(_minimum(qtensor.scale, qtensor.zero)):
        return Fit(Q4_1, reason=_rounded("products -s z", n_rounded, n))
    return Fit(Q4_1)


def _minimum(scale: Tensor, zero: Tensor | None) -> Tensor:
    """`-s z`, float32: exact, for 11 bits times 4 are fewer than 24."""
    if zero is None:
        raise AssertionError("a weight without zero points has no minimum")
    return -scale.float() * zero.float()


def _n_rounded(values: Tensor) -> int:
    """How many numbers are not float16 numbers."""
    return int((values.half().float() != values).sum())


def _rounded(what: str, n_rounded: int, n: int) -> str:
    return f"{n_rounded} of {n} {what} are not float16 numbers"


def encode(qtensor: QuantizedTensor, chosen: Fit) -> tuple[Tensor, Distance]:
    """Bytes uint8 `[N, row bytes]` of a weight, and how far off the stored values are."""
    parts, distance = [], Distance()
    for part in _parts(qtensor):
        content = _encode_part(part, chosen)
        parts.append(content)
        if chosen.reason is not None:
            distance.add(part.values(), _stored_values(content, chosen.type, part.shape))
    return torch.cat(parts), distance


@dataclass(frozen=True)
class _Part:
    """Some rows of a weight, unpacked. scale, zero: `[rows or 1, G]`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    g_idx: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def values(self) -> Tensor:
        """float32 `[rows, K]`."""
        return values_of(self.codes, self.scale, self.zero, self.spec, self.g_idx)

    def in_blocks(self, values: Tensor, block: int) -> Tensor:
        """One value for each block, `[rows, K / block]`, of one for each group."""
        n, k = self.shape
        repeats = self.spec.columns_per_group(k) // block
        return values.repeat_interleave(repeats, 1)[:, : k // block].expand(n, -1)


def _parts(qtensor: QuantizedTensor) -> Iterator[_Part]:
    n, k = qtensor.shape
    step = max(1, _CHUNK // k)
    whole = qtensor.spec.group_size == PER_TENSOR
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        own = slice(None) if whole else rows
        yield _Part(
            unpack(qtensor.packed[rows], qtensor.spec.bits, k),
            qtensor.scale[own],
            None if qtensor.zero is None else qtensor.zero[own],
            qtensor.spec,
            qtensor.g_idx,
        )


def _encode_part(part: _Part, chosen: Fit) -> Tensor:
    if chosen.type.name == "F32":
        return part.values().view(torch.uint8)
    if not chosen.keeps_codes:
        return round_to_q8_0(part.values())
    if part.zero is None:
        zero: Tensor | float = part.spec.levels.offset
    else:
        zero = part.in_blocks(part.zero.float(), 1)
    if chosen.type is Q4_1:
        minimum = part.in_blocks(_minimum(part.scale, part.zero), Q4_1.block)
        return encode_q4_1(
            part.codes, part.in_blocks(part.scale, Q4_1.block).half(), minimum.half()
        )
    steps = ((part.codes.float() - zero) * chosen.multiple).to(torch.int16)
    block = BLOCKS[chosen.type.name]
    scale = part.in_blocks(part.scale.float() / chosen.multiple, block.type.block)
    return block.encode(steps, scale.half())


def round_to_q8_0(values: Tensor) -> Tensor:
    """Bytes uint8 `[N, row bytes]` of float32 values `[N, K]`, each rounded to the nearest of 255
    steps of its block's largest magnitude."""
    blocks = values.view(values.shape[0], -1, Q8_0.type.block)
    scale = (blocks.abs().amax(-1) / 127).half()
    divisor = scale.float().masked_fill(scale == 0, torch.inf)[..., None]
    steps = (blocks / divisor).round().clamp(-127, 127)
    return Q8_0.encode(steps.to(torch.int16).view(values.shape), scale)


def _stored_values(content: Tensor, kind: GgmlType, shape: tuple[int, int]) -> Tensor:
    if kind.name == "F32":
        return content.view(torch.float32)
    return dequantize(kind.name, content, shape)
