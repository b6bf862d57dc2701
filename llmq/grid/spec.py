"""How a tensor is quantized: frozen, validated, JSON in and out, with a short text form for rules
on the command line.

w4g128        4-bit integers, symmetric, one scale per 128 columns
w3g64-asym    3-bit integers with a zero point per group
w8            8-bit integers, one scale per row
w4-tensor     one scale for the whole tensor
w2h-g64       2 bits at -1.5, -0.5, 0.5 and 1.5 steps
ternary-g128  {-1, 0, 1} times a scale per 128 columns
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_type_hints

from llmq.arguments import check_type
from llmq.errors import LlmqError
from llmq.fields import check_fields
from llmq_kernels.core.codes import CODES, Code

PER_ROW = -1
PER_TENSOR = 0
SMALLER_GROUPS = (128, 64, 32)
LARGEST_GROUP = 2**31 - 1
MAX_TEXT = 64  # characters of the short form

_TEXT = re.compile(
    r"(?:w(?P<bits>\d+h?)|(?P<ternary>ternary))"
    r"(?:-?g(?P<group>\d+)|-(?P<whole>row|tensor))?"
    r"(?P<asymmetric>-asym)?"
)


@dataclass(frozen=True)
class QuantSpec:
    """How a weight `[N, K]` is quantized.

    code: a name in `llmq_kernels.CODES`. group_size: columns that share a scale; -1 for one scale
    per row, 0 for one per tensor. symmetric: no zero point is stored. scale_dtype: the dtype that
    scales are stored in, and rounded to before any code is computed."""

    code: str = "int4"
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.code not in CODES:
            raise LlmqError(f"unknown code {self.code!r}: expected one of {', '.join(CODES)}")
        if not PER_ROW <= self.group_size <= LARGEST_GROUP or self.group_size == 1:
            raise LlmqError(
                f"group size {self.group_size}: expected a number of columns from 2 up, -1 (one "
                "scale per row) or 0 (one per tensor)"
            )
        if not self.symmetric and not self.levels.has_zero_points:
            raise LlmqError(
                f"{self.code} codes are symmetric: they have no zero point to move; leave out "
                "--asymmetric"
            )

    @property
    def levels(self) -> Code:
        """The code that the name stands for."""
        return CODES[self.code]

    @property
    def bits(self) -> int:
        return self.levels.bits

    def columns_per_group(self, k: int) -> int:
        """Columns that share a scale in a weight with `k` columns."""
        return self.group_size if self.group_size > 0 else k

    def n_groups(self, k: int) -> int:
        return -(-k // self.columns_per_group(k))

    def n_scales(self, n: int, k: int) -> int:
        """Of an `[n, k]` tensor, and as many zero points where it has some."""
        return 1 if self.group_size == PER_TENSOR else n * self.n_groups(k)

    def bits_per_weight(self, n: int, k: int) -> float:
        """Stored bits per weight of an `[n, k]` tensor, scales and zero points included."""
        n_scales = self.n_scales(n, k)
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        return self.bits + n_scales * (scale_bits + (0 if self.symmetric else self.bits)) / (n * k)

    def fit(self, k: int) -> QuantSpec | None:
        """This spec with a group size that divides `k`: its own, else the largest of 128, 64, 32
        below it that does, else None (keep the layer in full precision)."""
        if self.group_size <= 0 or k % self.group_size == 0:
            return self
        smaller = [size for size in SMALLER_GROUPS if size < self.group_size and k % size == 0]
        return replace(self, group_size=smaller[0]) if smaller else None

    def __str__(self) -> str:
        name = "ternary" if self.code == "ternary" else self.code.replace("int", "w")
        dash = "-" if name[-1].isalpha() else ""
        group = {PER_ROW: "", PER_TENSOR: "-tensor"}.get(
            self.group_size, f"{dash}g{self.group_size}"
        )
        return name + group + ("" if self.symmetric else "-asym")

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read the short text form. Raises `LlmqError` with the forms that exist."""
        check_type("spec", text, str, "a text such as w4g128")
        match = _TEXT.fullmatch(text.strip().lower()) if len(text) <= MAX_TEXT else None
        code = match and ("ternary" if match["ternary"] else f"int{match['bits']}")
        if not match or code not in CODES:
            raise LlmqError(
                f"cannot read the quantization {text!r}: expected forms are w4g128, w3g64-asym, "
                f"w8, w4-tensor, ternary-g128 (bits {_widths()}), or keep"
            )
        group_size = (
            int(match["group"])
            if match["group"]
            else PER_TENSOR
            if match["whole"] == "tensor"
            else PER_ROW
        )
        return cls(code=str(code), group_size=group_size, symmetric=not match["asymmetric"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QuantSpec:
        """The inverse of `to_json`. Raises `LlmqError` for what makes no spec."""
        return cls(**known_fields(data, cls, "quantization"))


def _widths() -> str:
    """Bits of the codes of whole steps, in words."""
    return ", ".join(
        str(bits) for bits in sorted({c.bits for c in CODES.values() if c.has_zero_points})
    )


@dataclass(frozen=True)
class ActSpec:
    """How what flows between layers is quantized at inference.

    kind: of the inputs of linear layers, before an integer matmul: "none", "int8-token" (a scale
    per token from its own largest magnitude) or "int8-static" (a range per layer, stored). kv_bits:
    of keys and values, 8, 4 or None; kv_before_rope: before the rotary embedding instead of after
    it (see `llmq.activations.keys_values`)."""

    kind: Literal["none", "int8-token", "int8-static"] = "none"
    kv_bits: int | None = None
    kv_before_rope: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "activation quantization: ")
        if self.kv_bits not in (None, 8, 4):
            raise LlmqError(f"keys and values of {self.kv_bits} bits: expected 8 or 4")

    @property
    def is_none(self) -> bool:
        """Nothing but weights is quantized."""
        return self == ActSpec()

    def __str__(self) -> str:
        parts = [self.kind] * (self.kind != "none") + (
            [f"{self.kv_bits}-bit keys and values"] if self.kv_bits else []
        )
        return " and ".join(parts) or "none"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ActSpec:
        """The inverse of `to_json`. Raises `LlmqError` for what makes no spec."""
        return cls(**known_fields(data, cls, "activations"))


def known_fields(data: Any, cls: type, what: str) -> dict[str, Any]:
    """`data` if it is an object with some of the fields of a dataclass; else `LlmqError`."""
    known = list(get_type_hints(cls))
    if not isinstance(data, dict):
        raise LlmqError(
            f"{what} {data!r}: expected an object with some of the keys {', '.join(known)}"
        )
    if unknown := sorted(map(str, set(data) - set(known))):
        raise LlmqError(f"{what}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    return data
